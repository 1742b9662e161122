"""Where a training shows how far it is. It imports nothing, so that the process that holds it starts at once."""

from __future__ import annotations


class Board:
    """An actor that holds the newest progress of rank 0, and whether the training was told to stop."""

    def __init__(self) -> None:
        self.row = (-1, 0.0, 0.0)
        self.stopping = False

    def write(self, step: int, loss: float, rate: float) -> None:
        """Takes the newest (step, loss, samples per second)."""
        self.row = (step, loss, rate)

    def read(self) -> tuple[int, float, float]:
        """What was written last; step -1 before that."""
        return self.row

    def stop(self) -> None:
        """Tells the training to save a checkpoint and end."""
        self.stopping = True

    def is_stopping(self) -> bool:
        """Whether it was told so."""
        return self.stopping
