"""Weights that a download brings: from a hub and a file server on this machine, pinned, kept, and refused in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import HubServer

from data.errors import UserError
from training import hub
from training.metrics import extractors

CHECKOUT = Path(__file__).parents[2]


class Silent(SimpleHTTPRequestHandler):
    """Serves a folder and writes no log."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[str, Path]]:
    """The URL of a folder on a web server, and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_a_published_file_is_fetched_once_and_held_against_its_digest(served, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    url, folder = served
    (folder / "weights.pth").write_bytes(b"as published")
    right = hashlib.sha256(b"as published").hexdigest()
    with pytest.raises(UserError, match=r"weights.pth cannot be downloaded \(invalid hash value"):
        hub.file(f"{url}/weights.pth", "0" * 64)
    place = hub.file(f"{url}/weights.pth", right)
    assert place.read_bytes() == b"as published"
    (folder / "weights.pth").unlink()
    assert hub.file(f"{url}/weights.pth", right) == place
    place.write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"cannot be downloaded \(HTTP Error 404.*copy it here and give its path"
    ):
        hub.file(f"{url}/weights.pth", right)


def test_a_hub_that_drops_packets_is_said_within_seconds(monkeypatch):
    """A listener whose queue is full leaves a connection as unanswered as a firewall does."""
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as queue:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(4):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        started = time.monotonic()
        with pytest.raises(UserError, match=f"cannot be downloaded .{address} does not answer"):
            hub.folder("hub:somebody/unheard-of", "clip")
        with pytest.raises(UserError, match=r"127\.0\.0\.1 does not answer"):
            hub.file(f"{address}/never-fetched.pth", "0" * 64)
        assert time.monotonic() - started < 20


def test_what_is_to_be_downloaded_is_said_by_name_and_nothing_else_is(tmp_path):
    assert extractors.place_of("dinov2", "hub") == "hub:facebook/dinov2-large"
    assert extractors.place_of("inception", "hub") == "hub"
    assert extractors.place_of("clip", "hub:openai/clip-vit-base-patch32@3d74acf") == (
        "hub:openai/clip-vit-base-patch32@3d74acf"
    )
    assert extractors.place_of("clip", str(tmp_path)) == str(tmp_path)
    for kind, source in (("clip", "hub"), ("clip", "hub:"), ("inception", "hub:a/b"), ("dinov2", "hub:a")):
        with pytest.raises(UserError, match="names nothing: write hub"):
            extractors.place_of(kind, source)
    with pytest.raises(UserError, match=r"nothing lies at openai/clip.*or hub:OWNER/NAME to download it"):
        extractors.place_of("clip", "openai/clip")


@pytest.mark.slow
def test_a_score_by_weights_from_the_hub_is_that_by_a_folder_and_needs_no_hub_again(dinov2_folder, tmp_path):
    (tmp_path / "repository").mkdir()
    for path in Path(dinov2_folder).iterdir():
        (tmp_path / "repository" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "repository" / "pytorch_model.bin").write_bytes(b"pickled")
    rng = np.random.default_rng(0)
    for side in ("real", "fake"):
        (tmp_path / side).mkdir()
        for number in range(6):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{number}.png")
    server = HubServer({"somebody/tiny": tmp_path / "repository"})
    try:
        of_hub = scored(tmp_path, "hub:somebody/tiny", server.address)
    finally:
        server.stop()
    assert of_hub == scored(tmp_path, str(dinov2_folder), server.address)
    assert of_hub == scored(tmp_path, "hub:somebody/tiny", server.address), (
        "from the cache, by a hub that is gone"
    )
    assert not any(request.endswith(".bin") for request in server.asked), (
        "what would be unpickled stays there"
    )
    said = scored(tmp_path, "hub:somebody/else", server.address)
    assert (
        "hub:somebody/else is no folder here and cannot be downloaded" in said
        and "copy it here and give its path" in said
    )


def scored(folder: Path, weights: str, endpoint: str) -> object:
    """What a process of `darkroom score` prints as its scores, or says in its error."""
    line = [
        "score",
        f"--real={folder}/real",
        f"--fake={folder}/fake",
        f"--extractor=dinov2={weights}",
        "--json",
    ]
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [sys.executable, "-m", "flows.cli", *line],
        env=os.environ | variables,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return json.loads(finished.stdout)["scores"] if finished.returncode == 0 else finished.stderr
