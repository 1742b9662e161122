"""Which Ray cluster the stages run on: one started for this run on loopback, or an existing one that is asserted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import UserError

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


@contextmanager
def cluster(address: str, *, verbose: bool = False) -> Iterator[None]:
    """Ray, connected for the length of the block.

    `local` starts a cluster of this machine's CPUs, without dashboard, on loopback, and stops it afterwards; `auto` and
    `HOST:PORT` attach to a running one. Raises UserError when there is none: Ray itself would quietly start a local one.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE", "disabled")
    import ray

    if ray.is_initialized():
        yield
        return
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if address == "local":
        # A packaged working directory would hide the checkout behind a copy; workers import what the driver imports.
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=os.cpu_count(),
            runtime_env=_runtime(),
            **options,
        )
    else:
        _attach(address, options)
    try:
        yield
    finally:
        ray.shutdown()


def num_cpus() -> int:
    """CPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def num_gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _attach(address: str, options: dict) -> None:
    import ray

    if address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: job submission is not part of this version; use auto or HOST:PORT of a head"
        )
    try:
        ray.init(address=address, runtime_env=_runtime(), **options)
    except ConnectionError as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there; start one with `ray start --head`, or use --address local"
        ) from error


def _runtime() -> dict:
    checkout = str(Path(__file__).resolve().parent.parent)
    return {
        "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))}
    }
