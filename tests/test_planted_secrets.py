"""Planted secrets are in no file, line, job or flow that Darkroom leaves behind, wherever a run is carried out."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows import serving

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "flows"))
from command_lines import CHECKOUT, TINY, command, environment, result
from prefect_server import deploy, ended, entry, eventually, log, prefect_server, start
from ray_cluster import ray_cluster

pytestmark = pytest.mark.slow

PASSWORD = "pa55w0rd-of-the-source"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED01",
    "AWS_SECRET_ACCESS_KEY": "planted/secret/access/key/0123456789abcd",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789abcdef",
    "PREFECT_API_KEY": "pnu_planted0123456789abcdef",
    "PREFECT_API_AUTH_STRING": "admin:planted-prefect-password",
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef0",
}
SIGNATURE = "5167a7u2e0123456789"


@pytest.fixture
def guarded() -> Iterator[tuple[str, list[str]]]:
    """(address, paths served) of a web server that shows its pictures to who knows the password."""
    served: list[str] = []
    wanted = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = self.path.split("?")[0].strip("/").removesuffix(".png")
            if self.headers.get("Authorization") != wanted or not number.isdecimal():
                self.send_error(404 if number else 401)
                return
            buffer = io.BytesIO()
            pixels = np.random.default_rng(int(number)).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            self.send_response(200)
            self.send_header("Content-Length", str(buffer.tell()))
            self.end_headers()
            self.wfile.write(buffer.getvalue())
            served.append(self.path)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}", served
    server.shutdown()
    thread.join()
    server.server_close()


def readable(path: Path) -> bytes:
    """The bytes of a file, and what they stand for where they are compressed."""
    payload = path.read_bytes()
    if path.suffix == ".parquet" and payload:
        payload += repr(pq.read_table(path).to_pylist()).encode()
    return payload


def source(folder: Path, address: str, pictures: int) -> Path:
    """A table whose URLs hold a password and a signature, two of which lead nowhere."""
    rows = [
        {
            "url": f"http://me:{PASSWORD}@{address}/{i}.png?X-Amz-Signature={SIGNATURE}",
            "caption": f"noise {i} heliotrope",
        }
        for i in range(pictures)
    ]
    rows += [{"url": f"http://me:{PASSWORD}@{address}/gone", "caption": "gone"}]
    rows += [{"url": f"sftp://me:{PASSWORD}@{address}/1.png", "caption": "of another kind"}]
    table = folder / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def files_of(*folders: Path) -> dict[str, bytes]:
    """Path -> what can be read there, of every file below `folders`."""
    return {str(path): readable(path) for f in folders for path in f.rglob("*") if path.is_file()}


def leaked(secrets: dict[str, str], places: dict[str, bytes]) -> list[tuple[str, str]]:
    """(secret, place) wherever one is found, as it is or in base64."""
    planted = {**secrets, "the source's password": PASSWORD, "a signature": SIGNATURE}
    return [
        (name, place)
        for name, secret in planted.items()
        for place, payload in places.items()
        if secret.encode() in payload or base64.b64encode(secret.encode()) in payload
    ]


PREPARED = {
    "shard.samples_per_shard": 4,
    "shard.image_size": 32,
    "shard.max_failed_fraction": 0.5,
    "shard.fetch.allow_private": True,
    "fanout.num_workers": 1,
}


@pytest.mark.timeout(1500)
def test_no_secret_of_the_environment_or_of_a_source_is_in_any_file_or_line_of_a_run(guarded, tmp_path):
    address, served = guarded
    table, root = source(tmp_path, address, 60), tmp_path / "root"
    settings = {k: v for k, v in TINY.items() if k != "source.count"} | {
        "shard.samples_per_shard": 31,
        "shard.fetch.allow_private": "true",
        "evaluate.reconstruction_images": 20,
    }
    line = command("run", "demo", f"--data={table}", "--json", "--verbose", root=root, settings=settings)
    finished = subprocess.run(
        line,
        env=environment() | SECRETS | {"PREFECT_HOME": str(root / ".prefect")},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    record = result(finished)
    assert len(served) == 60 and record["report"]
    assert "prompt_accuracy" not in record["metrics"] and "clip_score" in record["metrics"]
    files = files_of(root)
    said = {"stdout": finished.stdout.encode(), "stderr": finished.stderr.encode()}
    assert any(b"heliotrope" in payload for payload in files.values()), "the search finds what is there"
    hidden = f"http://***@{address}/0.png?X-Amz-Signature=***".encode()
    assert any(hidden in payload for name, payload in files.items() if name.endswith("00000.parquet"))
    assert any(name.endswith("prefect.db") for name in files)
    assert leaked(SECRETS, {**files, **said}) == []


@pytest.mark.timeout(600)
def test_no_secret_of_a_client_or_of_the_nodes_is_in_any_file_or_line_of_a_job(
    guarded, tmp_path, prefect_api, monkeypatch
):
    address, served = guarded
    table, root = source(tmp_path, address, 8), tmp_path / "root"
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=1)
        options = ["--json", "--verbose", f"--address={cluster.http}"]
        finished = subprocess.run(
            command("prepare", str(table), *options, root=root, settings=PREPARED),
            env=environment() | cluster.client | {"PREFECT_API_URL": prefect_api},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert result(finished) and len(served) == 8
        told = json.dumps(cluster.jobs())
        assert "shard-" in told and any(cluster.folder.rglob("job-driver-shard-*.log"))
        said = {"stdout": finished.stdout, "stderr": finished.stderr, "the table of jobs": told}
        places = files_of(root, cluster.folder) | {name: text.encode() for name, text in said.items()}
        assert any(name.endswith(".json") and "_meta/specs" in name for name in places)
        assert leaked(SECRETS | {"RAY_AUTH_TOKEN": cluster.token}, places) == []


@pytest.mark.timeout(600)
def test_no_secret_of_a_worker_is_in_any_file_of_its_flows_or_of_prefects_server(
    guarded, tmp_path, monkeypatch
):
    address, served = guarded
    table, root, home = source(tmp_path, address, 8), tmp_path / "root", tmp_path / "prefect"
    with prefect_server(home) as url:
        run = {"data": str(table), "root": str(root), "settings": PREPARED}
        deploy(tmp_path, entry("prepare", "darkroom", run))
        for name, secret in SECRETS.items():
            monkeypatch.setenv(name, secret)
        with serving.worker(home, url, "darkroom"):
            state = ended(started := start("prepare/darkroom"))
            assert state.name == "Completed", state.message
            eventually(lambda: any(line.startswith("shard     done") for line in log(started)))
    assert len(served) == 8
    places = files_of(root, home)
    assert any(b"heliotrope" in payload for payload in places.values()), "the search finds what is there"
    assert {"prefect.db", "worker.log", "server.log"} <= {Path(name).name for name in places}
    assert leaked(SECRETS, places) == []
