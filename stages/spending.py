"""What a stage spends: seconds that workers held devices, and what they cost.

Noted beside the artifact while they pass, so that an attempt that was killed counts too, less its last seconds.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from data import storage
from data.config import Config
from stages import telemetry

log = logging.getLogger("darkroom.spending")

Device = Literal["cpu", "gpu"]
NOTED_EVERY_SECONDS = 10.0


class PricesConfig(Config):
    """What an hour of a device costs; without a price nothing is said of money."""

    cpu_hour: float | None = Field(None, ge=0, description="price of one CPU core for an hour")
    gpu_hour: float | None = Field(
        None, ge=0, description="price of one GPU for an hour, its share of the machine included"
    )
    currency: str = Field("USD", pattern=r"^\S{1,8}$", description="what the prices are in: a code or a sign")

    def cost(self, device_seconds: Mapping[str, float]) -> float | None:
        """What so many seconds of each device cost; None where one of them has no price."""
        prices = {"cpu": self.cpu_hour, "gpu": self.gpu_hour}
        total = 0.0
        for device, seconds in device_seconds.items():
            if (price := prices[device]) is None:
                return None
            total += price * seconds / 3600
        return total if device_seconds else None

    def told(self, device_seconds: Mapping[str, float]) -> str:
        """`0.021 USD`: their cost to two digits, or to cents from 1 on; empty where it is not known."""
        if (cost := self.cost(device_seconds)) is None:
            return ""
        return f"{cost:.2f} {self.currency}" if cost >= 1 else f"{cost:.2g} {self.currency}"


def hours(device_seconds: Mapping[str, float]) -> str:
    """`0.35 CPU-hours, 2.1 GPU-hours`; empty where no device was held."""
    return ", ".join(
        f"{seconds / 3600:.2g} {device.upper()}-hours" for device, seconds in sorted(device_seconds.items())
    )


def total(spent: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums over what several stages spent."""
    sums: dict[str, float] = {}
    for device_seconds in spent:
        for device, seconds in device_seconds.items():
            sums[device] = sums.get(device, 0.0) + seconds
    return sums


class Meter:
    """Counts the time that workers hold their devices, `each` of them per worker, for the artifact `fingerprint` in `folder`."""

    def __init__(self, folder: str, fingerprint: str, device: Device, each: float = 1.0) -> None:
        self.device: Device = device
        self.each, self.seconds = each, 0.0
        self.since = self.noted = time.monotonic()
        self.path = storage.join(_notes(folder), f"{fingerprint}-{uuid.uuid4().hex[:12]}.json")

    def tell(self, workers: int) -> None:
        """Counts the time since the last call, for as many workers as there are now."""
        now = time.monotonic()
        held = workers * self.each * (now - self.since)
        self.since = now
        self.seconds += held
        telemetry.tell("darkroom_device_seconds", held, device=self.device)
        if now - self.noted >= NOTED_EVERY_SECONDS:
            self.note()

    def note(self) -> None:
        """Writes down what was counted so far."""
        self.noted = time.monotonic()
        try:
            storage.write_bytes(self.path, json.dumps({self.device: round(self.seconds, 3)}).encode())
        except OSError as error:  # accounts are no reason to end a stage; what else is written will tell
            log.debug("%s: %s", self.path, error)


def spent(folder: str, fingerprint: str) -> dict[str, float]:
    """Device -> seconds that all attempts at the artifact `fingerprint` in `folder` held it."""
    return total(note for path in _noted(folder, fingerprint) if (note := _read(path)))


def _read(path: str) -> dict[str, float] | None:
    """A note of seconds by device; None where it is damaged: what a stage made is not to be lost over its account."""
    try:
        return {
            str(device): float(seconds) for device, seconds in json.loads(storage.read_bytes(path)).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        log.debug("%s: %s", path, error)
        return None


def settle(folder: str, fingerprint: str) -> None:
    """Removes the notes of `fingerprint`, whose sum its snapshot holds."""
    for path in _noted(folder, fingerprint):
        storage.remove(path)


def _noted(folder: str, fingerprint: str) -> list[str]:
    notes = _notes(folder)
    names = [
        name
        for name in storage.list_files(notes)
        if name.startswith(f"{fingerprint}-") and name.endswith(".json")
    ]
    return [storage.join(notes, name) for name in names]


def _notes(folder: str) -> str:
    return storage.join(folder, "_meta", "spent")
