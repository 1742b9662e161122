"""Commands that make things run by themselves: deployments on a server, and a server with a worker on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from data import storage
from flows import console, places


def deploy(arguments: argparse.Namespace) -> int:
    """Applies the file of deployments to the server at PREFECT_API_URL."""
    _tell(_deployed(arguments), json=arguments.json)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Runs a server and a worker until it is told to end."""
    from flows.serving import serve as served

    root = places.checked_root(arguments.root)
    places.make_folder(root)
    home = Path(arguments.home) if arguments.home else _home(root)
    console.set_up_logging(verbose=False)
    served(
        home.expanduser().absolute(),
        arguments.port,
        lambda: _tell(_deployed(arguments), json=False),
        lambda url: console.out.print(
            f"serving {root}: {url.removesuffix('/api')} shows it, PREFECT_API_URL={url} reaches it, Ctrl-C ends it",
            soft_wrap=True,
            markup=False,
        ),
    )
    return 0


def _home(root: str) -> Path:
    """Beside the home of embedded servers: two servers on one SQLite file would wait for each other."""
    if storage.is_local(root):
        return storage.local_path(root) / ".prefect" / "served"
    return Path.home() / ".cache" / "darkroom" / "served"


def _deployed(arguments: argparse.Namespace) -> list[Any]:
    for name, value in (("PREFECT_SERVER_ANALYTICS_ENABLED", "false"), ("DO_NOT_TRACK", "1")):
        os.environ.setdefault(name, value)
    from flows import deploying

    file = Path(arguments.file) if arguments.file else deploying.FILE
    fill = {"root": places.checked_root(arguments.root), "address": arguments.address}
    return deploying.deploy(file, fill)


def _tell(applied: list[Any], *, json: bool) -> None:
    if json:
        console.emit({"applied": [vars(each) for each in applied]})
        return
    rows = [
        [each.kind, each.name, ": ".join(filter(None, [each.change, ", ".join(each.details)]))]
        for each in applied
    ]
    console.out.print(console.plain_table(["", "on the server", "change"], rows, "left"))
    if all(each.change == "unchanged" for each in applied):
        console.out.print("nothing to do: the server holds all of it")
