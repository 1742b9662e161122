"""What lies on disk, for any content: it is read back as it was written, damage is told, and a commit is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image

from data import columns, manifest, storage
from data.errors import CorruptArtifact
from data.manifest import FileRecord, Ledger, ShardRecord, Snapshot, keys_digest
from data.rows import Row
from data.shards import ShardConfig, write_shard
from data.tars import BLOCK, ShardReader, TarWriter

CHECKOUT = Path(__file__).parents[2]
OURS = str(CHECKOUT / "data") + os.sep
STRIDE = 5
"""Of the steps of a shard's publication every fifth is a kill: lines between two calls of the system change nothing on disk."""
ON_DISK = [HealthCheck.function_scoped_fixture]  # every example overwrites the one before it
RARE = [HealthCheck.filter_too_much]  # lists of samples with keys of their own are drawn anew now and then


# --- tars: (key, extension, image, json, caption) of each sample ---------------------------------------------------

Sample = tuple[str, str, bytes, dict[str, Any], str]

EDGES = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
PAYLOADS = st.one_of(
    st.builds(lambda size, fill: bytes([fill]) * size, EDGES, st.sampled_from([0, 0x30, 0xFF])),
    st.binary(max_size=3 * BLOCK),
)
KEYS = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="./"), min_size=1, max_size=95
)
SAMPLES = st.lists(
    st.tuples(
        KEYS,
        st.sampled_from(["jpg", "png", "webp"]),
        PAYLOADS,
        st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
        st.text(max_size=200),
    ),
    max_size=4,
    unique_by=lambda sample: sample[0],
)


def members(samples: list[Sample]) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.{kind}", payload)
        for key, extension, image, fields, caption in samples
        for kind, payload in (
            (extension, image),
            ("json", json.dumps(fields, ensure_ascii=False).encode()),
            ("txt", caption.encode()),
        )
    ]


def write(path: Path, samples: list[Sample]) -> bytes:
    """Writes the archive, and returns its bytes."""
    with path.open("wb") as stream:
        tar = TarWriter(stream)
        for name, payload in members(samples):
            tar.add(name, payload)
        tar.finish()
    return path.read_bytes()


def read(path: Path) -> list[tuple[str, bytes, dict[str, Any], str]]:
    with ShardReader(str(path)) as reader:
        return [
            (key, reader.image(row), reader.fields(row), reader.caption(row))
            for row, key in enumerate(reader.keys)
        ]


def content(samples: list[Sample]) -> list[tuple[str, bytes, dict[str, Any], str]]:
    return [(key, image, fields, caption) for key, _, image, fields, caption in samples]


@settings(max_examples=80, deadline=None, suppress_health_check=ON_DISK)
@given(SAMPLES)
def test_any_samples_are_read_back_by_us_and_by_the_standard_library(
    tmp_path: Path, samples: list[Sample]
) -> None:
    path = tmp_path / "00000.tar"
    write(path, samples)
    assert read(path) == content(samples)
    with tarfile.open(path, "r:") as tar:
        listed = tar.getmembers()
        found = [(member.name, tar.extractfile(member).read()) for member in listed]  # type: ignore[union-attr]
    assert found == members(samples)
    assert all(member.isreg() and member.mtime == member.uid == 0 for member in listed)


@settings(max_examples=120, deadline=None, suppress_health_check=ON_DISK)
@given(SAMPLES, st.data())
def test_an_archive_cut_anywhere_is_told_unless_only_padding_is_gone(
    tmp_path: Path, samples: list[Sample], data: st.DataObject
) -> None:
    path = tmp_path / "00000.tar"
    whole = write(path, samples)
    with ShardReader(str(path)) as reader:
        needed = reader.end + 2 * BLOCK
    edge = st.sampled_from([needed - BLOCK, needed - 1, needed, len(whole) - 1])
    size = data.draw(st.one_of(st.integers(0, len(whole) - 1), edge))
    path.write_bytes(whole[:size])
    if size < needed:
        with pytest.raises(CorruptArtifact, match=r"00000\.tar, byte \d+: "):
            read(path)
    else:
        assert read(path) == content(samples)


@settings(max_examples=200, deadline=None, suppress_health_check=ON_DISK)
@given(SAMPLES.filter(bool), st.data())
def test_any_changed_byte_of_a_header_is_told_or_changes_nothing(
    tmp_path: Path, samples: list[Sample], data: st.DataObject
) -> None:
    path = tmp_path / "00000.tar"
    whole = bytearray(write(path, samples))
    with tarfile.open(path, "r:") as tar:
        header = data.draw(st.sampled_from(tar.getmembers())).offset
    at = data.draw(st.integers(0, BLOCK - 1))
    whole[header + at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        found = read(path)
    except CorruptArtifact as error:
        assert f"00000.tar, byte {header}: " in str(error)
    else:
        assert 148 <= at < 156, "only the checksum's own field can be written in more than one way"
        assert found == content(samples)


# --- columns -------------------------------------------------------------------------------------------------------

HALVES = st.floats(width=16, allow_nan=False, allow_infinity=False)  # with subnormal ones and both zeros
AXES = {"img_emb": 2, "vae_moments": 4}


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """A column and values for it: of any number of samples, none included."""
    column = draw(st.sampled_from(sorted(AXES)))
    per_sample = draw(nps.array_shapes(min_dims=AXES[column] - 1, max_dims=AXES[column] - 1, max_side=4))
    return column, draw(nps.arrays(np.float16, (draw(st.integers(0, 4)), *per_sample), elements=HALVES))


@st.composite
def ragged(draw: st.DrawFn) -> list[np.ndarray]:
    width = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 5), max_size=5))
    return [draw(nps.arrays(np.float16, (length, width), elements=HALVES)) for length in lengths]


@pytest.fixture(params=["a disk", "an object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    name = f"properties-{uuid4().hex}"
    yield str(tmp_path) if request.param == "a disk" else f"memory://{name}"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


def cut(folder: str, path: str, data: st.DataObject) -> None:
    """Takes any number of bytes off the end of a file."""
    whole = storage.read_bytes(storage.join(folder, path))
    storage.write_bytes(storage.join(folder, path), whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=80, deadline=None, suppress_health_check=ON_DISK)
@given(arrays(), st.data())
def test_any_array_comes_back_to_the_bit_and_is_told_when_it_was_cut(
    folder: str, written: tuple[str, np.ndarray], data: st.DataObject
) -> None:
    column, values = written
    record = columns.write_array(folder, column, 0, values)
    found = columns.open_array(folder, column, 0)
    assert (found.shape, found.dtype, found.tobytes()) == (values.shape, np.dtype("<f2"), values.tobytes())
    cut(folder, record.path, data)
    with pytest.raises(CorruptArtifact, match=rf"{column}_00000\.npy"):
        columns.open_array(folder, column, 0)


@settings(max_examples=80, deadline=None, suppress_health_check=ON_DISK)
@given(ragged(), st.data())
def test_any_ragged_rows_come_back_to_the_bit_and_are_told_when_either_file_was_cut(
    folder: str, rows: list[np.ndarray], data: st.DataObject
) -> None:
    files = columns.write_ragged(folder, "text_hidden", 0, rows)
    found = columns.open_ragged(folder, "text_hidden", 0)
    assert [found[row].tobytes() for row in range(len(found))] == [row.tobytes() for row in rows]
    assert [found[row].shape for row in range(len(found))] == [row.shape for row in rows]
    damaged = data.draw(st.sampled_from(files))
    cut(folder, damaged.path, data)
    with pytest.raises(CorruptArtifact, match=Path(damaged.path).name):
        columns.open_ragged(folder, "text_hidden", 0)


# --- manifests: a publisher killed at each of its steps ------------------------------------------------------------

PUBLISHER = """
import os, resource, signal, sys
from data import manifest, storage

kind, before, after, home = sys.argv[1:]
model, publish = {
    "receipt": (manifest.ShardRecord, manifest.publish_receipt),
    "snapshot": (manifest.Snapshot, manifest.publish_snapshot),
}[kind]
after = model.model_validate_json(after)


def at_step(number):
    "Dies before line `number` of what it runs of data/storage.py."
    left = number

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != storage.__file__:
            return None
        if event == "line":
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    sys.settrace(trace)


def at_byte(number):
    "Dies of the write that would make a file longer than `number` bytes, what fits having been written."
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def is_killed(fault, number):
    folder = f"{home}/{fault.__name__}-{number:05d}"
    os.makedirs(folder)
    if before:
        publish(folder, model.model_validate_json(before))
    if not (child := os.fork()):
        try:
            fault(number)
            publish(folder, after)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    return status != 0


step = 0
while is_killed(at_step, step):
    step += 1
for byte in range(0, len(after.model_dump_json(indent=1)), 101):
    assert is_killed(at_byte, byte)
"""

OLD_SHARD = ShardRecord(
    index=3,
    samples=2,
    keys=keys_digest(["a", "b"]),
    files=(FileRecord(path="00003.tar", bytes=3, sha256="ab" * 32),),
    ledger=Ledger(written=2, failed={"html": 1}),
)
NEW_SHARD = OLD_SHARD.model_copy(update={"samples": 3, "ledger": Ledger(written=3)})
OLD_SNAPSHOT = Snapshot(stage="shard", version=1, fingerprint="0123456789ab", config={}, shards=(OLD_SHARD,))
NEW_SNAPSHOT = OLD_SNAPSHOT.model_copy(update={"shards": (NEW_SHARD,), "facts": {"caption": "\u2603" * 40}})

KINDS: dict[str, tuple[Any, Any, Callable[[str], Any], Callable[[str, Any], Any]]] = {
    "receipt": (
        OLD_SHARD,
        NEW_SHARD,
        lambda folder: manifest.load_receipt(folder, 3),
        manifest.publish_receipt,
    ),
    "snapshot": (
        OLD_SNAPSHOT,
        NEW_SNAPSHOT,
        lambda folder: next(iter(manifest.snapshots(folder)), None),
        manifest.publish_snapshot,
    ),
}


@pytest.mark.parametrize("is_there", [True, False], ids=["over an older one", "for the first time"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_publisher_killed_at_any_step_or_byte_leaves_the_old_state_or_the_new(
    tmp_path: Path, kind: str, is_there: bool
) -> None:
    old, new, load, publish = KINDS[kind]
    before = old if is_there else None
    line = [sys.executable, "-c", PUBLISHER, kind, before.model_dump_json() if before else ""]
    subprocess.run([*line, new.model_dump_json(), str(tmp_path)], cwd=CHECKOUT, check=True, timeout=60)
    folders = sorted(tmp_path.iterdir())
    seen = [_bare(load(str(folder))) for folder in folders]
    assert all(state in (before, new) for state in seen)
    steps = [state for state, folder in zip(seen, folders, strict=True) if folder.name.startswith("at_step")]
    done = steps.index(new)
    assert done > 5 and steps == [before] * done + [new] * (len(steps) - done), (
        "one step makes the difference"
    )
    for folder in folders:
        publish(str(folder), new)
        assert _bare(load(str(folder))) == new
        assert all(os.fsdecode(name).endswith(".json") for name in _listed(folder)), "no draft is listed"


def _bare(state: Any) -> Any:
    """A snapshot without the place that it was read from."""
    return state.model_copy(update={"folder": ""}) if isinstance(state, Snapshot) else state


def _listed(folder: Path) -> list[str]:
    return [entry.name for entry in storage.list_tree(str(folder))]


# --- a whole shard: tar, columns, receipt and snapshot, killed anywhere --------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """Samples with an embedding and hidden states each."""

    samples: list[Sample]
    embeddings: np.ndarray
    hidden: list[np.ndarray]

    def publish(self, folder: Path) -> None:
        """As stages do: each file under its name when it is whole, the receipt after them, the snapshot last."""
        folder.mkdir(parents=True, exist_ok=True)
        storage.remove_drafts(str(folder))
        draft = folder / f".tmp-{uuid4().hex}-00000.tar"
        write(draft, self.samples)
        storage.publish_file(draft, str(folder / "00000.tar"))
        keys = [key for key, *_ in self.samples]
        files = (
            manifest.file_record(str(folder), "00000.tar"),
            columns.write_array(str(folder), "img_emb", 0, self.embeddings),
            *columns.write_ragged(str(folder), "text_hidden", 0, self.hidden),
            columns.write_metadata(str(folder), 0, keys, keys),
        )
        shard = ShardRecord(index=0, samples=len(keys), keys=keys_digest(keys), files=files)
        manifest.publish_receipt(str(folder), shard)
        manifest.publish_snapshot(str(folder), OLD_SNAPSHOT.model_copy(update={"shards": (shard,)}))


@st.composite
def artifacts(draw: st.DrawFn) -> Artifact:
    samples = draw(SAMPLES)
    count, width = len(samples), draw(st.integers(1, 3))
    hidden = [draw(nps.arrays(np.float16, (n, 2), elements=HALVES)) for n in range(count)]
    return Artifact(samples, draw(nps.arrays(np.float16, (count, width), elements=HALVES)), hidden)


def steps(run: Callable[[], None], last: int | None = None) -> int:
    """Lines of `data/` that `run` goes through. With `last` the process kills itself before that one."""
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            if passed == last:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return passed


def is_killed(run: Callable[[], None], last: int) -> bool:
    """Whether a child process that does `run` comes to its step `last`, where it kills itself."""
    if not (child := os.fork()):
        try:
            steps(run, last)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), f"it failed by itself: {status}"
    return status != 0


def visible(folder: Path) -> dict[str, bytes]:
    """Every file but drafts, which no reader looks at."""
    found = storage.list_tree(str(folder)) if folder.exists() else []
    return {entry.name: (folder / entry.name).read_bytes() for entry in found}


def assert_whole_or_not_there(folder: Path, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Every file is the old one or the new one, and whoever is told of by a manifest that is new is new too."""
    found = visible(folder)
    assert all(content in (before.get(name), after.get(name)) for name, content in found.items())
    assert before.keys() <= found.keys()
    for name in found:
        if name.startswith("_meta/") and found[name] == after[name] != before.get(name):
            kind = ShardRecord if "receipts" in name else Snapshot
            made = kind.model_validate_json(found[name])
            shards = made.shards if isinstance(made, Snapshot) else (made,)
            for file in (file for shard in shards for file in shard.files):
                assert manifest.file_record(str(folder), file.path) == file


@settings(max_examples=25, deadline=None, suppress_health_check=[*ON_DISK, *RARE])
@given(artifacts(), st.booleans(), artifacts(), st.data())
def test_an_artifact_of_any_samples_killed_anywhere_is_whole_or_not_there_and_the_next_attempt_makes_it(
    tmp_path: Path, new: Artifact, is_there: bool, old: Artifact, data: st.DataObject
) -> None:
    folder, undisturbed, counted = (tmp_path / uuid4().hex for _ in range(3))
    new.publish(undisturbed)
    after = visible(undisturbed)
    total = steps(lambda: new.publish(counted))  # the second time, since headers of tars are remembered
    if is_there:
        old.publish(folder)
    before = visible(folder)
    last = data.draw(st.integers(0, 2**20 - 1)) * total >> 20
    assert is_killed(lambda: new.publish(folder), last) or is_there, (
        "a folder that is there takes fewer steps"
    )
    assert_whole_or_not_there(folder, before, after)
    new.publish(folder)
    assert visible(folder) == after and not [*folder.rglob(".tmp-*")]


@pytest.mark.slow
def test_a_shard_of_pictures_killed_at_each_step_of_its_publication_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    """Before and after each file, its sync, its rename, the receipt and the snapshot."""
    rows = [Row(i, str(tmp_path / f"{i}.png"), f"picture {i}", f"{i}.png") for i in range(2)]
    for row in rows:
        Image.new("RGB", (8, 8), (row.index, 0, 0)).save(row.image)

    def attempt(folder: Path) -> None:
        config = ShardConfig(image_size=8, encode_format="png", samples_per_shard=2)
        record = write_shard(rows, 0, str(folder), config)
        manifest.publish_receipt(str(folder), record)
        storage.remove_drafts(str(folder))
        manifest.publish_snapshot(str(folder), OLD_SNAPSHOT.model_copy(update={"shards": (record,)}))

    attempt(tmp_path / "undisturbed")
    after = visible(tmp_path / "undisturbed")
    total, seen = steps(lambda: attempt(tmp_path / "counted")), set[frozenset[str]]()
    assert total > 500
    for last in range(0, total, STRIDE):
        folder = tmp_path / f"{last}"
        assert is_killed(lambda folder=folder: attempt(folder), last)
        seen.add(frozenset(visible(folder)))
        assert_whole_or_not_there(folder, {}, after)
        attempt(folder)
        assert visible(folder) == after and not [*folder.rglob(".tmp-*")]
        shutil.rmtree(folder)
    assert len(seen) == len(after) + 1, "it was killed between any two files"
