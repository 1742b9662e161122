"""What a stage took, or will take by what earlier ones took: time, devices, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data.config import result_fields
from data.manifest import Snapshot
from flows import settings
from flows.graph import Node
from flows.recipes import Recipe
from stages import spending


@dataclass(frozen=True)
class Spending:
    """What a stage takes. Measured where it is cached; else estimated, None and empty where there is nothing to go by."""

    seconds: float | None = None
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    """Device (cpu, gpu) -> seconds that workers hold it."""
    bytes: int | None = None

    @classmethod
    def of(cls, made: Snapshot) -> Spending:
        """What `made` took."""
        return cls(made.seconds, made.device_seconds, made.bytes)


def estimate(recipe: Recipe, node: Node, earlier: Snapshot | None, growth: float = 1.0) -> Spending:
    """What `node` will take: as `earlier` did, by their steps and images, times `growth`; else the recipe's time alone."""
    if earlier is None or not earlier.seconds:
        return Spending(recipe.expected_seconds.get(node.name))
    now, then = settings.flat(result_fields(node.config)), settings.flat(earlier.config)
    images = growth * (now.get("num_images") or 1) / (then.get("num_images") or 1)
    work = images * (now.get("max_steps") or 1) / (then.get("max_steps") or 1)
    devices = {device: seconds * work for device, seconds in earlier.device_seconds.items()}
    return Spending(earlier.seconds * work, devices, round(earlier.bytes * images))


def total(spendings: Iterable[Spending]) -> Spending:
    """The sum of what is known."""
    spendings = [*spendings]
    devices = spending.total(s.device_seconds for s in spendings)
    seconds = [s.seconds for s in spendings if s.seconds is not None]
    sizes = [s.bytes for s in spendings if s.bytes is not None]
    return Spending(sum(seconds) if seconds else None, devices, sum(sizes) if sizes else None)
