"""The same server on PostgreSQL, as a cluster has it: deployed once, a schedule fires, a run leaves its artifacts."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import serving

sys.path.insert(0, str(Path(__file__).parent))
from prefect_server import artifacts, deploy, ended, entry, eventually, free_port, runs_of, talking_to

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


def test_a_schedule_fires_on_postgresql_and_deploying_again_changes_nothing(database, tmp_path):
    home, root = tmp_path / "home", tmp_path / "runs"
    settings = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
    }
    often = {"slug": "often", "interval": 20, "active": True}
    collect = entry("gc", "darkroom", {"root": str(root)}, often)
    with serving.server(home, free_port(), settings) as (url, _), talking_to(url):
        deploy(tmp_path, collect)
        assert {each.change for each in deploy(tmp_path, collect)} == {"unchanged"}
        with serving.worker(home, url, "darkroom"):
            first = eventually(
                lambda: next(
                    (r for r in runs_of("gc/darkroom") if r.state.is_running() or r.state.is_completed()),
                    None,
                )
            )
            assert first.auto_scheduled and ended(first).name == "Completed"
        assert artifacts(first)["gc"] == "[]"
        deploy(tmp_path, entry("gc", "darkroom", {"root": str(root)}))
    assert not (home / "prefect.db").exists(), "all of it lies in PostgreSQL"
