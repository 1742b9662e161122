"""The same server on PostgreSQL, as a cluster has it: deployed once, a schedule fires, pairs become a model that serves."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import pointers, serving

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import add_pictures
from prefect_server import artifacts, deploy, ended, entry, eventually, free_port, runs_of, talking_to
from untrained import DEPLOYED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
"""Where Debian keeps them, by version."""


@pytest.fixture
def database() -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL server on loopback, which does not run as root."""
    found = [shutil.which("initdb"), *map(str, reversed(INSTALLED))]
    if not (initdb := next(filter(None, found), None)):
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql")
    programs = Path(initdb).resolve().parent
    user = next((u for u in ("postgres", "nobody") if u in {p.pw_name for p in pwd.getpwall()}), None)
    if os.getuid() == 0 and user is None:
        pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as")
    other = (
        {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        if os.getuid() == 0 and user
        else {}
    )
    folder, port = Path(tempfile.mkdtemp(prefix="darkroom-postgres-")), free_port()
    if other:
        shutil.chown(folder, user)
    made = [programs / "initdb", "-D", folder / "data", "-U", "prefect", "-A", "trust", "--no-sync"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=folder, **other)
    options = ["-D", folder / "data", "-p", str(port), "-h", serving.HOST, "-k", folder, "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [programs / "postgres", *options], stdout=log, stderr=log, cwd=folder, **other
        )
    try:
        ready = [programs / "pg_isready", "-h", serving.HOST, "-p", str(port), "-q"]
        eventually(lambda: subprocess.run(ready).returncode == 0, 60, lambda: (folder / "log").read_text())
        yield f"postgresql+asyncpg://prefect@{serving.HOST}:{port}/postgres"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


def test_a_schedule_on_postgresql_leads_to_a_run_that_serves_and_deploying_again_changes_nothing(
    database, tmp_path
):
    home, root = tmp_path / "home", str(tmp_path / "runs")
    data = add_pictures(tmp_path / "pictures", range(60))
    run = {"recipe": "demo", "data": str(data), "root": root, "settings": DEPLOYED}
    often = entry("refresh", "darkroom", run, {"slug": "often", "interval": 20, "active": True})
    settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database}
    with serving.server(home, free_port(), settings) as (url, _), talking_to(url):
        deploy(tmp_path, often)
        assert {each.change for each in deploy(tmp_path, often)} == {"unchanged"}
        with serving.worker(home, url, "darkroom"):
            first = eventually(
                lambda: next((r for r in runs_of("refresh/darkroom") if r.state.is_running()), None)
            )
            deploy(tmp_path, entry("refresh", "darkroom", run))
            state = ended(first, 1200)
        assert first.auto_scheduled and state.name == "Completed", state.message
        (move,) = pointers.history(root)
        assert state.message.endswith(f"production is {move.run}: nothing was there before")
        assert json.loads(artifacts(first)["production"])[0]["run"] == move.run
    assert not (home / "prefect.db").exists(), "all of it lies in PostgreSQL"
