"""Repairing: what can be made again is, to the byte; what cannot is named with what to do; killed, it can be run again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data import manifest, sources, storage
from data.config import fingerprint, result_fields
from data.manifest import Snapshot, file_record
from data.shards import ShardConfig
from data.sources import SourceConfig
from data.verify import verify
from stages.catalogue import STAGES, run_spec
from stages.cluster import cluster
from stages.contract import FanoutConfig, InputRef, StageSpec, Workspace
from stages.encode import EncodeConfig
from stages.repair import repair
from stages.shard import ShardStageConfig

pytestmark = pytest.mark.slow

FANOUT = FanoutConfig(num_workers=1)
SHARD = ShardConfig(image_size=16, encode_format="png", samples_per_shard=4)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster("local"):
        yield


def picture(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(len(list(folder.iterdir())))
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"picture {name}")


def made(stage: str, folder: Path, config: Any, inputs: dict[str, InputRef]) -> Snapshot:
    name = fingerprint(
        stage, STAGES[stage].version, result_fields(config), {r: ref.fingerprint for r, ref in inputs.items()}
    )
    document = config.model_dump(mode="json")
    spec = StageSpec(
        stage=stage, config=document, inputs=inputs, folder=str(folder), fingerprint=name, fanout=FANOUT
    )
    return run_spec(spec)


def ref(snapshot: Snapshot) -> InputRef:
    return InputRef(stage=snapshot.stage, folder=snapshot.folder, fingerprint=snapshot.fingerprint)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a data set of two states, its latents, and a stage's trained weights; the source beside it."""
    home = tmp_path_factory.mktemp("home")
    source, root = home / "source", home / "root"
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(home / "vae")
    (source / "broken.png").parent.mkdir()
    (source / "broken.png").write_bytes(b"")
    (source / "broken.txt").write_text("nothing")
    for number in range(7):
        picture(source, f"m{number}")
    rules = SHARD.model_copy(update={"max_failed_fraction": 0.5})
    where, after = SourceConfig(path=str(source)), ""
    vae = InputRef(stage="vae", folder=str(home / "vae"), fingerprint="weights", external=True)
    for added in ((), ("a0", "z0")):
        for name in added:
            picture(source, name)
        config = ShardStageConfig(
            source=where, source_digest=sources.source_digest(where), shard=rules, after=after
        )
        data = made("shard", root / "store/shard/one", config, {})
        made("encode", root / "store/encode/two", EncodeConfig(), {"data": ref(data), "vae": vae})
        after = data.fingerprint
    storage.write_bytes(f"{root}/store/prior/three/model.bin", np.random.default_rng(0).bytes(3000))
    files = (file_record(f"{root}/store/prior/three", "model.bin"),)
    name = fingerprint("prior", 1, {}, {})
    weights = Snapshot(stage="prior", version=1, fingerprint=name, config={}, files=files)
    manifest.publish_snapshot(f"{root}/store/prior/three", weights)
    assert verify(str(root)).ok and len(data.shards) == 3
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "root"))


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def overwrite(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[600:700] = bytes(100)
    path.write_bytes(payload)


def flip(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[-300] ^= 16
    path.write_bytes(payload)


def test_a_sound_store_is_left_alone(root: Path) -> None:
    before = digests(root)
    assert repair(str(root), fanout=FANOUT).mended == ()
    assert digests(root) == before


def test_what_was_lost_is_made_again_to_the_byte(root: Path) -> None:
    before = digests(root)
    shard, encode = root / "store/shard/one", root / "store/encode/two"
    (shard / "00000.tar").unlink()
    (shard / "00001.parquet").write_bytes((shard / "00000.parquet").read_bytes())
    overwrite(shard / "00002.tar")
    overwrite(encode / "vae_moments/vae_moments_00001.npy")
    flip(encode / "vae_moments/vae_moments_00002.npy")
    flip(root / "store/prior/three/model.bin")
    (shard / "_meta/receipts/00001.json").write_bytes(b"{")
    done = repair(str(root), fanout=FANOUT)
    assert done.verdict.ok and verify(str(root)).ok
    assert digests(root) == before
    how = {mended.uri.removeprefix(f"{root}/store/"): mended.how for mended in done.mended}
    assert how == {
        "shard/one/00000.tar": "made again",
        "shard/one/00001.parquet": "made again",
        "shard/one/00002.tar": "made again",
        "shard/one/_meta/receipts/00001.json": "mended in place",
        "encode/two/vae_moments/vae_moments_00001.npy": "made again",
        "encode/two/vae_moments/vae_moments_00002.npy": "mended in place",
        "prior/three/model.bin": "mended in place",
    }


def test_embeddings_pictures_and_features_are_made_again_to_the_byte(untrained_run, tmp_path: Path) -> None:
    root = Path(shutil.copytree(untrained_run[0], tmp_path / "root"))
    before = digests(root)
    embed, generate, evaluate = (
        next((root / "store" / s).iterdir()) for s in ("embed", "generate", "evaluate")
    )
    (embed / "img_emb/img_emb_00000.npy").unlink()
    (embed / "text_hidden/text_hidden_00001.npy").unlink()
    (embed / "empty/text_emb.npy").unlink()
    (generate / "generated/generated_00000.npy").unlink()
    (evaluate / "predicted_emb/predicted_emb_00001.npy").unlink()
    done = repair(str(root), fanout=FANOUT)
    assert done.verdict.ok, done.verdict.problems
    assert {mended.how for mended in done.mended} == {"made again"} and len(done.mended) == 5
    assert digests(root).items() >= before.items(), "receipts of what was made again are new here"


def test_only_damaged_shards_are_made_again(root: Path) -> None:
    shard = root / "store/shard/one"
    kept = {name: (shard / name).stat().st_mtime_ns for name in ("00000.tar", "00002.tar")}
    (shard / "00001.tar").unlink()
    assert repair(str(root), fanout=FANOUT).verdict.ok
    assert {name: (shard / name).stat().st_mtime_ns for name in kept} == kept


def test_trained_weights_are_named_with_what_to_run(root: Path) -> None:
    overwrite(root / "store/prior/three/model.bin")
    before = digests(root)
    done = repair(str(root), fanout=FANOUT)
    assert done.mended == () and digests(root) == before
    (problem,) = done.verdict.problems
    assert "bytes 0 to 2999 changed" in problem.problem
    assert problem.problem.endswith(
        f"remove {root}/store/prior/three and run its recipe again, which makes prior anew"
    )


class Interrupted(BaseException):
    """What a Ctrl-C is."""


def test_interrupted_it_leaves_the_damage_for_all_to_see_and_can_be_run_again(root: Path) -> None:
    before = digests(root)
    for name in ("00000.tar", "00001.tar"):
        (root / "store/shard/one" / name).unlink()

    def interrupt(done: float, total: float, unit: str, note: str = "") -> None:  # noqa: ARG001
        if done:
            raise Interrupted

    with pytest.raises(Interrupted):
        repair(str(root), fanout=FANOUT, progress=interrupt)
    assert not verify(str(root)).ok
    assert repair(str(root), fanout=FANOUT).verdict.ok
    assert digests(root) == before


def test_a_source_that_is_gone_or_changed_is_named(root: Path, original: Path, tmp_path: Path) -> None:
    source = original.parent / "source"
    (root / "store/shard/one/00000.tar").unlink()
    hidden = source.rename(tmp_path / "hidden")
    try:
        (problem,) = repair(str(root), fanout=FANOUT).verdict.problems
    finally:
        hidden.rename(source)
    assert (
        problem.uri.endswith("00000.tar")
        and f"bring {source} back as it was and repair again" in problem.problem
    )
    text = (source / "m0.txt").read_text()
    (source / "m0.txt").write_text("another caption")
    try:
        (problem,) = repair(str(root), fanout=FANOUT).verdict.problems
    finally:
        (source / "m0.txt").write_text(text)
    assert f"1 of the 4 rows of shard 00000 are gone from {source}" in problem.problem
    assert repair(str(root), fanout=FANOUT).verdict.ok


def sharded(source: Path, folder: Path, after: str = "", rules: ShardConfig = SHARD) -> Snapshot:
    where = SourceConfig(path=str(source))
    rules = rules.model_copy(update={"max_failed_fraction": 0.5})
    config = ShardStageConfig(
        source=where, source_digest=sources.source_digest(where), shard=rules, after=after
    )
    return made("shard", folder, config, {})


@pytest.fixture(scope="module")
def mended_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose broken picture was mended between its two states: shard 0 has the failure, shard 2 the picture."""
    home = tmp_path_factory.mktemp("mended")
    for number in range(7):
        picture(home / "source", f"m{number}")
    (home / "source/a.png").write_bytes(b"")
    (home / "source/a.txt").write_text("mended later")
    first = sharded(home / "source", home / "root")
    Image.new("RGB", (16, 16)).save(home / "source/a.png")
    grown = sharded(home / "source", home / "root", after=first.fingerprint)
    assert (len(grown.shards), grown.ledger.failed, grown.ledger.written) == (3, {}, 8)
    return home


@pytest.mark.parametrize(
    "lost",
    [
        ["00000.tar"],
        ["00000_stats.json", "00000.tar"],
        ["00002.tar", "00002.parquet"],
        ["_meta/rows/first.npy"],
        ["_meta/rows/second.npy"],
    ],
    ids=" ".join,
)
def test_a_data_set_with_a_mended_row_is_repaired(
    mended_source: Path, tmp_path: Path, lost: list[str]
) -> None:
    root = Path(shutil.copytree(mended_source / "root", tmp_path / "root"))
    before = digests(root)
    first, second = sorted(manifest.snapshots(str(root)), key=lambda s: len(s.shards))
    for name in lost:
        name = name.replace("first", first.fingerprint).replace("second", second.fingerprint)
        (root / name).unlink()
    done = repair(str(root), fanout=FANOUT)
    assert done.verdict.ok, done.verdict.problems
    assert digests(root) == before


def test_lists_of_rows_are_made_again_from_the_source_or_it_is_said_that_it_changed(
    mended_source: Path, deduplicated: Path, tmp_path: Path
) -> None:
    for number, home in enumerate((deduplicated, mended_source)):
        root = Path(shutil.copytree(home / "root", tmp_path / f"{number}"))
        before = digests(root)
        shutil.rmtree(root / "_meta/rows")
        (root / "00000.tar").unlink()
        done = repair(str(root), fanout=FANOUT)
        if home == deduplicated:
            assert done.verdict.ok and digests(root) == before
    assert "the source changed" in done.verdict.problems[0].problem, (
        "nobody knows the size of the file that was broken"
    )


def test_what_only_the_parquet_told_of_a_mended_row_is_not_invented(
    mended_source: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(mended_source / "root", tmp_path / "root"))
    before = digests(root)
    for name in ("00000.parquet", "00000.tar"):
        (root / name).unlink()
    (problem,) = repair(str(root), fanout=FANOUT).verdict.problems
    assert problem.uri.endswith("00000.parquet") and "came out differently" in problem.problem
    before.pop("00000.parquet")
    assert digests(root) == before, "the tar is back"


NO_REPEATS = SHARD.model_copy(update={"deduplicate": "exact"})


def repeating(folder: Path) -> Path:
    """Nine pictures in three shards; the second of each but the first shows what a picture of the first does."""
    for number in range(9):
        picture(folder, f"p{number}")
    for copy, of in (("p5", "p0"), ("p8", "p2")):
        shutil.copy(folder / f"{of}.png", folder / f"{copy}.png")
    return folder


@pytest.fixture(scope="module")
def deduplicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("deduplicated")
    made = sharded(repeating(home / "source"), home / "root", rules=NO_REPEATS)
    assert made.ledger.filtered == {"duplicate_image": 2}
    return home


@pytest.mark.parametrize(
    "lost",
    [
        ["00001.tar"],
        ["00001.parquet"],
        ["00001.tar", "00001.parquet", "00001_stats.json"],
        ["00000.tar", "00000.parquet", "00001.parquet", "00002.parquet", "00002.tar"],
    ],
    ids=" ".join,
)
def test_a_data_set_without_repeats_is_repaired(deduplicated: Path, tmp_path: Path, lost: list[str]) -> None:
    root = Path(shutil.copytree(deduplicated / "root", tmp_path / "root"))
    before = digests(root)
    for name in lost:
        if (root / name).exists():
            (root / name).unlink()
    done = repair(str(root), fanout=FANOUT)
    assert done.verdict.ok, done.verdict.problems
    assert digests(root) == before


def test_without_its_source_nothing_sound_of_it_is_touched(deduplicated: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(deduplicated / "root", tmp_path / "root"))
    hidden = (deduplicated / "source").rename(tmp_path / "hidden")
    (root / "00001.tar").unlink()
    before = digests(root)
    try:
        (problem,) = repair(str(root), fanout=FANOUT).verdict.problems
    finally:
        hidden.rename(deduplicated / "source")
    assert problem.uri.endswith("00001.tar") and "bring" in problem.problem
    assert digests(root) == before


def test_killed_between_its_passes_a_run_decides_about_the_source_that_is_there_then(tmp_path: Path) -> None:
    source, passes = repeating(tmp_path / "source"), []

    def interrupt(done: float, total: float, unit: str, note: str = "") -> None:  # noqa: ARG001
        if not done:
            passes.append(total)
        if len(passes) == 2:
            raise Interrupted

    where = SourceConfig(path=str(source))
    config = ShardStageConfig(source=where, source_digest=sources.source_digest(where), shard=NO_REPEATS)
    with pytest.raises(Interrupted):
        STAGES["shard"].run(config, {}, Workspace(str(tmp_path / "root"), "killed", FANOUT, interrupt))
    assert list((tmp_path / "root/_drafts").glob("*.tar")) and not list((tmp_path / "root").glob("*.tar"))

    (source / "p0.png").unlink()
    picture(source, "p0")
    after_kill = sharded(source, tmp_path / "root", rules=NO_REPEATS)
    assert after_kill.ledger.filtered == {"duplicate_image": 1}, "p5 shows what is nowhere else now"
    undisturbed = sharded(source, tmp_path / "other", rules=NO_REPEATS)
    assert after_kill.digest == undisturbed.digest
    assert digests(tmp_path / "root").keys() == digests(tmp_path / "other").keys()
    assert verify(str(tmp_path / "root")).ok


def test_a_run_that_grew_the_data_set_before_the_repair_had_its_lease_is_seen(
    mended_source: Path, tmp_path: Path
) -> None:
    """What the repair was told is of an earlier state; what it does is about the present one."""
    root = tmp_path / "root"
    first = sharded(mended_source / "source", root)
    (root / "00000.tar").unlink()
    found = verify(str(root))
    picture(tmp_path / "source", "more")
    for path in (mended_source / "source").iterdir():
        shutil.copy2(path, tmp_path / "source")
    grown = sharded(tmp_path / "source", root, after=first.fingerprint)
    (root / "00002.tar").unlink()
    assert len(grown.shards) == 3
    done = repair(str(root), found=found, fanout=FANOUT)
    assert done.verdict.ok, done.verdict.problems
