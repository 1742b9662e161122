"""Worlds of several training processes on this machine, forked from one that has torch already: seconds instead of minutes.

Run as a program: `worlds.py MODULE FUNCTION SIZE ARGUMENTS_JSON` calls FUNCTION(*ARGUMENTS) in every one of SIZE gloo ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

CHECKOUT = Path(__file__).parents[2]


def start(module: str, function: str, size: int, *arguments: Any) -> subprocess.Popen[bytes]:
    """A world of `size` ranks in a process group of its own, each calling `function` of the test file `module`."""
    line = [sys.executable, __file__, module, function, str(size), json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, cwd=CHECKOUT, start_new_session=True)


def run(module: str, function: str, size: int, *arguments: Any) -> None:
    """Runs such a world to its end; every rank has to succeed."""
    world = start(module, function, size, *arguments)
    try:
        assert world.wait(timeout=300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(world.pid, signal.SIGKILL)  # ranks that hang too


def _loaded(module: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("world_of_tests", module)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _rank(function: Callable[..., None], rank: int, size: int, port: int, arguments: list[Any]) -> None:
    if size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    function(*arguments)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> int:
    module, function, size, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.set_num_threads(1)
    body = getattr(_loaded(module), function)  # imported once: each rank is a fork of this process
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(body, rank, size, port, arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
