"""Nothing secret is written down, and nothing that lies in a store leads out of it."""

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

from data.errors import UserError
from data.manifest import FileRecord, Snapshot, publish_snapshot
from data.verify import verify
from flows import cli, embedded_prefect

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, TINY, command, environment, result

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


@pytest.mark.parametrize(
    "line",
    [
        ["status", f"--root=s3://KEY:{PASSWORD}@bucket/x"],
        ["run", "demo", f"--root=https://me:{PASSWORD}@host/x"],
        ["plan", "demo", f"--data=s3://KEY:{PASSWORD}@bucket/x.parquet"],
        ["plan", "demo", f"--set=source.path=s3://KEY:{PASSWORD}@bucket/x"],
        ["plan", "demo", f"--set=vae.pretrained=abfs://c@a.net/x?sig={PASSWORD}"],
        ["prepare", f"sftp://me:{PASSWORD}@host/x"],
        ["verify", f"s3://KEY:{PASSWORD}@bucket"],
        ["run", "demo", f"--address=http://me:{PASSWORD}@127.0.0.1:8265"],
    ],
)
def test_a_place_with_credentials_is_refused_without_repeating_them(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    said = capsys.readouterr()
    assert "a URL with credentials in it" in said.err and said.err.count("\n") == 1
    assert PASSWORD not in said.err + said.out and list(tmp_path.iterdir()) == []


def test_prefect_is_not_given_a_url_that_it_would_log(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://me:{PASSWORD}@127.0.0.1:4200/api")
    with pytest.raises(UserError, match=r"PREFECT_API_URL names http://\*\*\*@127.0.0.1:4200/api"):
        embedded_prefect.configure(tmp_path, verbose=False)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "a/../../outside", "a\\b", "", "a/.."])
def test_a_manifest_leads_nowhere_else(path, tmp_path, capsys):
    (tmp_path / "outside").write_text("untouched")
    folder = tmp_path / "store" / "vae" / "key"
    file = FileRecord(path="inside", bytes=9, sha256="0" * 64)
    made = publish_snapshot(
        str(folder), Snapshot(stage="vae", version=1, fingerprint="key", config={}, files=(file,))
    )
    manifest = folder / "_meta" / "snapshots" / "key.json"
    manifest.write_text(made.model_dump_json().replace('"inside"', json.dumps(path)))
    (problem,) = verify(str(tmp_path)).problems
    assert problem.uri.endswith("key.json") and "is not a Snapshot" in problem.problem
    for line in (["verify", str(tmp_path)], ["lineage", str(folder)], ["status", f"--root={tmp_path}"]):
        assert cli.main(line) in (0, 1), line
    said = capsys.readouterr().err
    assert "Traceback" not in said and (tmp_path / "outside").read_text() == "untouched"


@pytest.mark.parametrize("name", ["../key", "a/b", "..", "/x"])
def test_a_snapshot_is_named_by_one_word(name):
    with pytest.raises(ValueError, match=r"leaves its folder|is no part of a path"):
        Snapshot(stage="vae", version=1, fingerprint=name, config={})


@pytest.mark.parametrize("name", ["../../etc", "..", "/etc", "store/../.."])
def test_a_run_is_a_folder_of_its_root(name, tmp_path, capsys):
    (tmp_path / "root").mkdir()
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "run.json").write_text('{"run": "etc", "report": "stolen"}')
    (tmp_path / "root" / "latest").write_text(name)
    for run in (name, "latest"):
        assert cli.main(["report", run, f"--root={tmp_path}/root/x/.."]) == 2
    assert "stolen" not in capsys.readouterr().out


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


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_secret_of_the_environment_or_of_a_source_is_in_any_file_or_line_of_a_run(guarded, tmp_path):
    address, served = guarded
    table, root = tmp_path / "pairs.jsonl", tmp_path / "root"
    rows = [
        {
            "url": f"http://me:{PASSWORD}@{address}/{i}.png?X-Amz-Signature={SIGNATURE}",
            "caption": f"noise {i} heliotrope",
        }
        for i in range(60)
    ]
    rows += [{"url": f"http://me:{PASSWORD}@{address}/gone", "caption": "gone"}]
    rows += [{"url": f"sftp://me:{PASSWORD}@{address}/1.png", "caption": "of another kind"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    files = {str(path): readable(path) for path in root.rglob("*") if path.is_file()}
    said = {"stdout": finished.stdout.encode(), "stderr": finished.stderr.encode()}
    assert any(b"heliotrope" in payload for payload in files.values()), "the search finds what is there"
    hidden = f"http://***@{address}/0.png?X-Amz-Signature=***".encode()
    assert any(hidden in payload for name, payload in files.items() if name.endswith("00000.parquet"))
    assert any(name.endswith("prefect.db") for name in files)
    planted = {**SECRETS, "the source's password": PASSWORD, "a signature": SIGNATURE}
    found = [
        (name, place)
        for name, secret in planted.items()
        for place, payload in {**files, **said}.items()
        if secret.encode() in payload or base64.b64encode(secret.encode()) in payload
    ]
    assert found == []
