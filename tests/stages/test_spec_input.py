"""`python -m stages SPEC`: what is no spec is one sentence and exit code 2, whatever lies there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from stages import __main__ as entry
from stages import logs

SPEC = '{"stage": "shard", "config": {}, "inputs": {}, "folder": "/nowhere", "fingerprint": "f"%s}'


@pytest.fixture
def said(monkeypatch, caplog):
    """(place) -> the one line that `python -m stages PLACE` logs, its exit code 2 having been checked."""

    def run(place: Path | str) -> str:
        monkeypatch.setattr(sys, "argv", ["stages", str(place), "--address=http://127.0.0.1:9"])
        monkeypatch.setattr(logs, "set_up", lambda: logging.getLogger("darkroom"))
        monkeypatch.setattr(entry.signal, "signal", lambda *_: None)
        assert entry.main() == 2
        (line,) = [record.getMessage() for record in caplog.records]
        assert "\n" not in line
        return line

    return run


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"stage": "shard"}',
        (SPEC % ', "more": 1').encode(), (SPEC % ', "fanout": {"num_workers": -1}').encode(),
        SPEC.replace('"f"', '"../f"').replace("%s", "").encode(),
    ],
)  # fmt: skip
def test_what_is_no_spec_is_told(said, tmp_path, content):
    (tmp_path / "spec.json").write_bytes(content)
    assert said(tmp_path / "spec.json").startswith(
        f"{tmp_path}/spec.json is no spec that this version of Darkroom knows ("
    )


def test_a_place_without_a_spec_is_told(said, tmp_path, caplog):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "spec.json"):
        assert said(place).startswith(f"{place} is no file: give the spec of a stage")
        caplog.clear()
    assert "does not exist where the stage runs" in said(tmp_path / "nothing.json")
    caplog.clear()
    assert "Protocol not known: nowhere" in said("nowhere://bucket/spec.json")
