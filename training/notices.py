"""What a training is told while it steps: that its place will be taken away, that somebody wants it to end.

A notice leaves half a minute and steps may take seconds, so it is asked for about every ten seconds, besides at every look at
the loss. To ask is collective: rank 0 says each time at which step the next time is, and clocks need not agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from training import distributed

EVERY_SECONDS = 10.0


class Notices:
    """Asks the two functions, each of any rank, at the same steps on every rank; `clock` steps are done."""

    def __init__(self, clock: int, preempted: Callable[[], bool], stopped: Callable[[], bool]) -> None:
        self._preempted, self._stopped = preempted, stopped
        self._asked_at, self._since = clock, time.monotonic()
        self._next = clock + 1  # what a step takes is not known before the first

    def is_due(self, clock: int) -> bool:
        """Whether it is time to ask, whoever looks at the loss; alike on every rank."""
        return clock >= self._next

    def ask(self, clock: int) -> tuple[bool, bool]:
        """(whether a checkpoint is wanted at once, whether no step is wanted after it). Collective; waits for the device."""
        distributed.wait_for_device()  # or the pace were that of who gives it work
        told = distributed.gathered((self._preempted(), self._stopped(), clock + self._steps_ahead(clock)))
        self._asked_at, self._since, self._next = clock, time.monotonic(), told[0][2]
        is_stopping = any(stop for _, stop, _ in told)
        return is_stopping or any(goes for goes, _, _ in told), is_stopping

    def _steps_ahead(self, clock: int) -> int:
        """As many steps as fit into EVERY_SECONDS at the pace of those since the last time, and no fewer than one."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        return max(1, int(EVERY_SECONDS * (clock - self._asked_at) / seconds))
