"""Checkpoints on a disk and in an object store: whole or not there, found by name, the best one kept."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint import CONFIG, Regression, _assert_equal_bits, _everything, _run

from data import storage
from training import checkpoint, loop
from training.checkpoint_places import place_of


@pytest.fixture(params=["a disk", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a training keeps its checkpoints."""
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if request.param == "a disk":
        return str(tmp_path / "checkpoints")
    return f"{request.getfixturevalue('bucket')}/store/net/key/checkpoints"


def _restored(folder: str) -> int:
    state = loop.build_state(Regression(), CONFIG)
    return state.clock if checkpoint.restore(folder, state, "one") else -1


def test_three_steps_and_three_after_a_restore_are_six_steps_to_the_bit(folder: str, tmp_path: Path) -> None:
    unbroken = _run(tmp_path / "unbroken", 6)
    _run(folder, 3)
    _assert_equal_bits(_run(folder, 6), unbroken)
    assert not list(tmp_path.glob("darkroom-*")), "no draft is left on this machine"


def test_a_checkpoint_is_there_once_its_state_is(folder: str) -> None:
    _run(folder, 2)
    _run(folder, 4)
    assert _restored(folder) == 4
    storage.remove(f"{folder}/step_00000004/state.json")
    assert _restored(folder) == 2


def test_a_damaged_one_is_passed_over_with_a_warning(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    _run(folder, 2)
    _run(folder, 4)
    (name,) = [n for n in storage.list_files(f"{folder}/step_00000004") if n.startswith("shard")]
    payload = bytearray(storage.read_bytes(f"{folder}/step_00000004/{name}"))
    payload[-1] ^= 1
    storage.write_bytes(f"{folder}/step_00000004/{name}", bytes(payload))
    with caplog.at_level(logging.WARNING):
        assert _restored(folder) == 2
    assert "passing over damaged checkpoint step_00000004" in caplog.text


def test_the_newest_and_the_best_are_kept(folder: str) -> None:
    state = loop.build_state(Regression(), CONFIG)
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)]:
        state.clock, state.curve = step, [{"step": step, "validation_loss": loss}]
        checkpoint.save(folder, state, "one")
    assert place_of(folder).names() == ["step_00000005", "step_00000004", "step_00000002"]


def test_a_write_that_fails_leaves_the_one_before(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _run(folder, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(place_of(folder)), "commit", full)
        with pytest.raises(OSError, match="No space left"):
            _run(folder, 4)
    state = loop.build_state(Regression(), CONFIG)
    assert checkpoint.restore(folder, state, "one")
    assert all(torch.equal(a, _everything(first)[name]) for name, a in _everything(state).items())


@pytest.mark.slow
def test_the_newest_is_found_before_a_listing_shows_it(
    bucket: str, object_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path))
    object_store.lag = 3600.0
    _run(f"{bucket}/checkpoints", 3)
    assert storage.list_folders(f"{bucket}/checkpoints") == [] and _restored(f"{bucket}/checkpoints") == 3
