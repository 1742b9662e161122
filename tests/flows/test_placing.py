"""A data set that grows: the store gains shards and columns behind the old ones, and touches nothing that was there."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from data import growth
from data.config import result_fields
from data.errors import CorruptArtifact
from data.growth import FAILED, WRITTEN
from data.manifest import ShardRecord, Snapshot, load_snapshot, publish_snapshot
from flows.assignments import edited
from flows.graph import prepare_nodes
from flows.plan import PlannedStage, make_plan
from flows.recipes import prepare, with_data
from stages.shard import again

SETTINGS = {"shard.samples_per_shard": 4, "shard.image_size": 16, "fanout.num_workers": 1}


def picture(folder: Path, name: str, shade: int) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (20, 16), (shade, 255 - shade, 40)).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"shade {shade}")


def plan_of(
    source: Path, root: Path, *, retry_failed: bool = False, settings: Mapping | None = None
) -> PlannedStage:
    recipe = edited(
        prepare(), [f"{path}={value}" for path, value in (SETTINGS | dict(settings or {})).items()]
    )
    recipe = with_data(recipe, str(source))
    return make_plan(recipe, prepare_nodes(recipe, retry_failed=retry_failed), str(root)).stages[0]


def table(path: Path, names: Sequence[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"url": f"s3://b/{name}.png", "caption": name}) + "\n" for name in names)
    )
    return path


def carried_out(stage: PlannedStage, *, failed: Sequence[int] = ()) -> PlannedStage:
    """Commits the snapshot that the stage would, made of manifests alone; of its new rows those at `failed` timed out."""
    config, identities = stage.node.config, stage.node.identities
    before = load_snapshot(stage.folder, config.after) if config.after else None
    known = growth.load(before) if before else growth.nothing_known()
    change = growth.growth(known, identities, again(known) if config.retry_failed else ())
    outcomes = [(FAILED, "timeout") if i in failed else (WRITTEN, "") for i in range(len(change.new))]
    known = growth.grown(known, change, identities, outcomes)
    shards = range((len(before.shards) if before else 0) + (len(change.new) + 3) // 4)
    snapshot = Snapshot(
        stage="shard",
        version=stage.node.stage.version,
        fingerprint=stage.fingerprint,
        config=result_fields(config),
        shards=tuple(ShardRecord(index=i, samples=4, keys="", files=()) for i in shards),
        files=(growth.save(stage.folder, stage.fingerprint, known),),
        facts={"reasons": list(known.reasons), "source": config.source.model_dump(mode="json")},
        created="2026-01-01T00:00:00+00:00",
    )
    publish_snapshot(stage.folder, snapshot)
    return stage


def test_more_rows_extend_the_artifact_and_the_plan_says_how_many(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcd")
    first = carried_out(plan_of(rows, tmp_path))
    assert plan_of(rows, tmp_path).status == "cached"
    table(rows, "xabcdyzuvw")
    grown = plan_of(rows, tmp_path)
    assert (grown.status, grown.folder) == ("pending", first.folder)
    assert grown.reason == "6 new rows in 2 new shards"
    carried_out(grown)
    assert plan_of(rows, tmp_path).status == "cached"
    table(rows, "yzuvwxabcd")
    assert plan_of(rows, tmp_path).fingerprint == grown.fingerprint, (
        "the order of a source that grew is of no account"
    )


def test_an_earlier_state_of_the_source_is_still_there(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcd")
    first = carried_out(plan_of(rows, tmp_path))
    carried_out(plan_of(table(rows, "abcdef"), tmp_path))
    again_first = plan_of(table(rows, "abcd"), tmp_path)
    assert (again_first.status, again_first.fingerprint) == ("cached", first.fingerprint)


def test_what_cannot_go_behind_the_newest_shards_is_a_new_artifact(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcd")
    first = carried_out(plan_of(rows, tmp_path))
    carried_out(plan_of(table(rows, "abcdef"), tmp_path))
    for other in ("abcx", "abcdx"):
        assert plan_of(table(rows, other), tmp_path).folder != first.folder


def test_rows_that_may_succeed_now_are_attempted_again_when_asked(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcdef")
    first = carried_out(plan_of(rows, tmp_path), failed=[1, 5])
    assert plan_of(rows, tmp_path).status == "cached"
    retried = plan_of(rows, tmp_path, retry_failed=True)
    assert (retried.status, retried.folder) == ("pending", first.folder)
    assert retried.reason == "2 failed rows are attempted again in 1 new shard"
    carried_out(retried, failed=[0])
    assert plan_of(rows, tmp_path).fingerprint == retried.fingerprint
    assert (
        plan_of(rows, tmp_path, retry_failed=True).reason == "1 failed row is attempted again in 1 new shard"
    )
    carried_out(plan_of(rows, tmp_path, retry_failed=True))
    assert plan_of(rows, tmp_path, retry_failed=True).status == "cached", "nothing is left to try again"


def test_rows_of_a_source_that_grew_are_attempted_again_too(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcdef")
    first = carried_out(plan_of(rows, tmp_path), failed=[1, 5])
    table(rows, "abcdefghi")
    assert plan_of(rows, tmp_path).reason == "3 new rows in 1 new shard"
    retried = plan_of(rows, tmp_path, retry_failed=True)
    assert (retried.status, retried.folder) == ("pending", first.folder)
    assert retried.reason == "3 new rows and 2 failed rows, attempted again, in 2 new shards"
    carried_out(retried)
    assert plan_of(rows, tmp_path).fingerprint == retried.fingerprint
    assert plan_of(rows, tmp_path, retry_failed=True).status == "cached", "nothing is left to try again"
    made = load_snapshot(retried.folder, retried.fingerprint)
    assert made is not None and made.shards[0] == load_snapshot(first.folder, first.fingerprint).shards[0]
    table(rows, "abcdefghij")
    assert plan_of(rows, tmp_path, retry_failed=True).reason == "1 new row in 1 new shard"


def test_a_lost_list_of_rows_is_told_and_nothing_is_sharded_anew_in_silence(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcd")
    first = carried_out(plan_of(rows, tmp_path))
    (Path(first.folder) / growth.rows_path(first.fingerprint)).unlink()
    with pytest.raises(CorruptArtifact, match=f"run `darkroom verify {first.folder} --repair`, or remove it"):
        plan_of(table(rows, "abcdef"), tmp_path)
    other = plan_of(table(tmp_path / "other.jsonl", "xyz"), tmp_path)
    assert other.status == "pending", "another source does not wait for it"


def test_an_unreadable_snapshot_is_told(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcd")
    first = carried_out(plan_of(rows, tmp_path))
    (Path(first.folder) / f"_meta/snapshots/{first.fingerprint}.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="is not a Snapshot"):
        plan_of(table(rows, "abcdef"), tmp_path)


def test_other_rules_are_another_artifact(tmp_path):
    rows = table(tmp_path / "pairs.jsonl", "abcd")
    first = carried_out(plan_of(rows, tmp_path))
    recipe = with_data(edited(prepare(), ["shard.samples_per_shard=2"]), str(rows))
    assert make_plan(recipe, prepare_nodes(recipe), str(tmp_path)).stages[0].folder != first.folder


def prepared(darkroom, source: Path, root: Path, *options: str, settings: Mapping | None = None) -> None:
    given = SETTINGS | {"shard.max_failed_fraction": 0.5} | dict(settings or {})
    finished = darkroom("prepare", str(source), *options, "--json", root=root, settings=given)
    assert finished.returncode == 0, finished.stderr


def digests(folder: str) -> dict[str, str]:
    files = [p for p in Path(folder).iterdir() if p.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


@pytest.mark.slow
def test_new_rows_go_to_new_shards_and_the_old_ones_keep_their_bytes(tmp_path, darkroom):
    source, root = tmp_path / "pictures", tmp_path / "runs"
    for number in range(6):
        picture(source, f"b{number}", 10 * number)
    (source / "broken.png").write_bytes(b"")
    (source / "broken.txt").write_text("nothing")
    prepared(darkroom, source, root)
    first = plan_of(source, root)
    assert first.status == "cached" and len(first.snapshot.shards) == 2
    before = digests(first.folder)

    for number in range(3):
        picture(source, f"a{number}", 100 + number)  # sorts before all that is there
    picture(source, "broken", 7)  # mended: it was never written, so it may change
    pending = plan_of(source, root)
    assert (pending.status, pending.folder) == ("pending", first.folder)
    assert pending.reason == "4 new rows in 1 new shard"

    prepared(darkroom, source, root)
    grown = plan_of(source, root)
    assert grown.status == "cached" and [s.samples for s in grown.snapshot.shards] == [4, 2, 4]
    after = digests(first.folder)
    assert {name: after[name] for name in before} == before
    ledger = grown.snapshot.ledger
    assert (ledger.written, ledger.failed, ledger.attempted) == (10, {}, 10)

    (source / "b0.png").unlink()
    assert plan_of(source, root).folder != first.folder, "a written row is gone: another data set"


class Pictures(BaseHTTPRequestHandler):
    """Serves `/{shade}.png`; the paths in `busy` answer 503."""

    busy: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        buffer = io.BytesIO()
        Image.new("RGB", (20, 16), (int(self.path[1:-4]), 0, 0)).save(buffer, "PNG")
        self.send_response(503 if self.path in self.busy else 200)
        self.send_header("Content-Length", str(len(buffer.getvalue())))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_what_a_busy_server_refused_is_asked_for_again_and_nothing_else(tmp_path, darkroom, web):
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"url": f"{web}/{shade}.png", "caption": f"shade {shade}"} for shade in range(6)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {
        "shard.fetch.allow_private": "true",
        "shard.fetch.attempts": 1,
        "shard.fetch.backoff_seconds": 0.01,
    }
    Pictures.busy = {"/1.png", "/4.png"}
    prepared(darkroom, rows, tmp_path / "runs", settings=settings)
    first = plan_of(rows, tmp_path / "runs", settings=settings)
    assert first.snapshot.ledger.failed == {"http_503": 2}
    before = digests(first.folder)

    Pictures.busy = {"/4.png"}
    Pictures.asked.clear()
    prepared(darkroom, rows, tmp_path / "runs", "--retry-failed", settings=settings)
    assert sorted(Pictures.asked) == ["/1.png", "/4.png"]
    retried = plan_of(rows, tmp_path / "runs", settings=settings)
    assert retried.folder == first.folder and retried.status == "cached"
    ledger = retried.snapshot.ledger
    assert (ledger.written, ledger.failed, ledger.attempted) == (5, {"http_503": 1}, 6)
    after = digests(first.folder)
    assert {name: after[name] for name in before} == before
