"""One rank of two that cannot write its part of a checkpoint: both hear of it, and what was there before stays what counts."""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from training import checkpoint, checkpoint_facts, checkpoint_places, distributed, loop

sys.path.insert(0, str(Path(__file__).parent))
import worlds
from test_loop import CONFIG, Regression

pytestmark = pytest.mark.slow


def _full(*_: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "no space left on this rank's disk")


def _no_draft(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint_places._OnDisk, "draft", _full)


def _no_room(_: pytest.MonkeyPatch) -> None:
    """The operating system refuses every byte past the sixteenth of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))


def _no_end(patch: pytest.MonkeyPatch) -> None:
    """What was written cannot be closed, as on a network's file system that is full."""
    write = checkpoint._write_tensors
    patch.setattr(checkpoint, "_write_tensors", lambda *given: _full(write(*given)))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "draft": _no_draft,
    "write": _no_room,
    "close": _no_end,
}


def save_three_times(folder: str, fault: str) -> None:
    """One of two ranks: a whole checkpoint, one that the second rank cannot write, and a whole one again."""
    state = loop.build_state(Regression(), CONFIG)
    _save(folder, state, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            FAULTS[fault](patch)
        with pytest.raises(OSError, match=r"no space left|File too large"):
            _save(folder, state, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert [path.name for path in Path(folder).glob("step_*")] == ["step_00000001"]
    assert checkpoint_facts.latest(folder) == "step_00000001"
    dist.barrier()
    _save(folder, state, 3)
    assert not list(Path(folder).glob(".tmp-*"))


def _save(folder: str, state: checkpoint.TrainState, step: int) -> None:
    state.clock = step
    checkpoint.save(folder, state, "one")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_one_rank_cannot_write_is_none_and_fails_on_both(
    tmp_path: Path, fault: str
) -> None:
    worlds.run(__file__, "save_three_times", 2, str(tmp_path), fault)
    assert checkpoint_facts.latest(str(tmp_path)) == "step_00000003"
