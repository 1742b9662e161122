from typing import Any

import pytest
import ray

from stages import cluster

BUSY = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.fixture
def starts(monkeypatch) -> list[Exception | None]:
    """What each start of Ray in turn ends with, None being a cluster that is there."""
    ends: list[Exception | None] = []

    def init(**_: Any) -> None:
        if error := ends.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return ends


def test_a_start_that_a_busy_machine_made_too_slow_is_tried_once_more(starts):
    starts += [Exception(BUSY), None]
    cluster._start({})
    assert starts == []


@pytest.mark.parametrize(
    "ends", [[Exception(BUSY), Exception(BUSY), None], [ValueError("a bad option"), None]]
)
def test_any_other_failure_and_a_second_one_are_told(starts, ends):
    starts += ends
    with pytest.raises(type(ends[0])):
        cluster._start({})
    assert starts == [None]
