"""The training curve: what the steps since its last row came to, kept on the device until someone looks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training import distributed, flops, optim, spikes
from training.checkpoint import TrainState
from training.systems.system import Batch, Trainable, TrainConfig

LOG_EVERY = 20
"""Steps between looks at the loss; a look is the only time that a step waits for its device."""

TIMES = frozenset(
    {"samples_per_second", "samples_per_second_per_device", "data_wait", "flops_per_second_per_device", "mfu"}
)
"""Fields of a row that tell of the machine and not of the result; the curve on disk has none of them."""


class Window:
    """The steps since the curve's last row. `state` brings those before a resume, and the rows that say what is usual."""

    def __init__(
        self, trainable: Trainable, config: TrainConfig, state: TrainState, key_of: spikes.KeyOf
    ) -> None:
        self.trainable, self.config, self.key_of = trainable, config, key_of
        self.pending = [tuple(pair) for pair in state.pending]
        self.flops_per_step: int | None = None
        """Of this worker, forward and backward; 0 on all but rank 0, which alone reports."""
        self.is_in_trouble = False
        """Whether the newest step looked at was skipped and `on_spike` may return to a checkpoint: not the time to save one."""
        self._open(state)

    def _open(self, state: TrainState) -> None:
        self.curve = state.curve or []
        self.norm_limit = spikes.norm_limit(self.curve, self.config.spike_factor)
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self.told = len(self.pending)
        self.restart_clock(state.clock)

    def add(self, losses: Tensor, grad_norm: Tensor, position: Tensor) -> None:
        """Takes what a step left on the device: per-sample losses (B,), the global gradient norm (), positions (B,)."""
        self.steps.append((losses, grad_norm, position))

    def is_due(self, clock: int) -> bool:
        """Whether it is time to look."""
        return clock % LOG_EVERY == 0 or clock == self.config.max_steps

    def look(self, clock: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of every step of the window, means over ranks. Collective.

        Steps that were skipped are named once, as `on_spike` says: by FloatingPointError for "fail", by a warning else.
        """
        if not self.steps:
            return list(self.pending)
        losses = distributed.mean_over_ranks(
            torch.stack([losses.mean() for losses, _, _ in self.steps])
        ).tolist()
        norms = torch.stack([norm for _, norm, _ in self.steps]).tolist()
        pairs = [*self.pending, *zip(losses, norms, strict=True)]
        first = clock - len(pairs) + 1
        bad = [i for i in range(self.told, len(pairs)) if self._is_bad(pairs[i])]
        self.told = len(pairs)
        self.is_in_trouble = self.config.on_spike == "rollback" and self._is_bad(pairs[-1])
        found = [
            spikes.described(
                first + i,
                *pairs[i],
                self.steps[i - len(self.pending)],
                self.trainable,
                self.config,
                self.key_of,
            )
            for i in bad
        ]
        spikes.tell(found, self.config)
        return pairs

    def close(self, state: TrainState) -> dict[str, Any]:
        """Appends the window's row, means over ranks, to `state.curve`, and opens the next one; returns it with its times.

        Raises as `look` does, and `spikes.Diverged` when too many of the newest steps were skipped.
        """
        pairs = self.look(state.clock)
        good = [pair for pair in pairs if not self._is_bad(pair)]
        row = {
            "step": state.clock,
            "samples": state.clock * self.config.batch_size,
            "loss": statistics.fmean(loss for loss, _ in good) if good else math.nan,
            "grad_norm": statistics.fmean(norm for _, norm in good) if good else math.nan,
            "learning_rate": optim.learning_rate(state.clock - 1, self.config),
            "steps": len(pairs),
            "skipped": len(pairs) - len(good),
            "rollbacks": 0,
            "validation_loss": None,
        }
        times = self._times(state.clock)
        state.curve, state.pending, self.pending = [*self.curve, row], [], []
        self._open(state)
        spikes.judge(state.curve, self.config)
        return {**row, **times}

    @property
    def rows_end(self) -> int:
        """The step of the newest row, 0 before the first."""
        return self.curve[-1]["step"] if self.curve else 0

    def validated(self, loss: float) -> dict[str, float]:
        """Notes the held-out loss in the newest row; the time that it took is not training's."""
        self.curve[-1]["validation_loss"] = loss
        self.restart_clock(self.rows_end)
        return {"validation_loss": loss}

    def count_flops(self, recorded: flops.Recorded, clock: int) -> None:
        """Learns what a step costs from the network's arguments in one; the time up to here, with compilation, counts for nothing."""
        per_part = 0
        if distributed.rank() == 0:
            per_part = flops.forward_backward_flops(self.trainable.build, recorded)
        self.flops_per_step = per_part * self.config.accumulate
        self.restart_clock(clock)

    def restart_clock(self, clock: int) -> None:
        """The times of the next row begin here."""
        self.since, self.waited, self.opened = time.monotonic(), 0.0, clock

    def _is_bad(self, pair: tuple[float, float]) -> bool:
        loss, norm = pair
        return not math.isfinite(loss) or not norm <= self.norm_limit

    def _times(self, clock: int) -> dict[str, float]:
        seconds, steps = max(time.monotonic() - self.since, 1e-9), clock - self.opened
        rate, world = steps * self.config.batch_size / seconds, distributed.world_size()
        times = {
            "samples_per_second": rate,
            "samples_per_second_per_device": rate / world,
            "data_wait": min(1.0, self.waited / seconds),
        }
        if self.flops_per_step:
            times["flops_per_second_per_device"] = self.flops_per_step * steps / seconds
            peak = flops.peak_flops(distributed.device())
            if peak and self.config.precision == "bf16":
                times["mfu"] = times["flops_per_second_per_device"] / peak
        return times


class Reports:
    """Gives rows to `report`, and remembers their times, which no curve holds, for a row that changes later."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.report = report
        self.times: dict[int, dict[str, Any]] = {}

    def __call__(self, row: dict[str, Any]) -> None:
        """Reports a new row."""
        self.times[row["step"]] = {name: value for name, value in row.items() if name in TIMES}
        self.report(row)

    def again(self, row: dict[str, Any]) -> None:
        """Reports a row of the curve that changed; of one that an earlier process made the rate is not known."""
        self.report({**row, **self.times.get(row["step"], {"samples_per_second": math.nan})})


def timed(items: Any, window: Window) -> Any:
    """The same items; the time that each was waited for is added to the window's."""
    iterator = iter(items)
    while True:
        start = time.monotonic()
        try:
            item: Batch = next(iterator)
        except StopIteration:
            return
        window.waited += time.monotonic() - start
        yield item
