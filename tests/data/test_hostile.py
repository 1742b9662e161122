"""No file, however broken or malicious, crashes, hangs, warns or takes memory at will: each is stored or refused by reason."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).with_name("hostile.py")
CASES = runpy.run_path(str(CORPUS))["CASES"]
LONGEST_SECONDS = 2.0
LIBTIFF = ("ZIPDecode:", "TIFF", "LZW", "Fax", "_TIFF")
"""libtiff itself writes to stderr what it finds wrong; Pillow leaves no way to stop it."""


@pytest.fixture(scope="module")
def attempts() -> tuple[dict[str, Any], str]:
    """What became of every case, in a process with little memory where a warning is an error; and its stderr."""
    environment = os.environ | {"PYTHONPATH": str(CORPUS.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(CORPUS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"the process ended with {done.returncode} at {lines[-1:]}: {done.stderr}"
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {item["name"]: item for item in found}, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_stored_or_refused_by_reason(
    name: str, attempts: tuple[dict[str, Any], str]
) -> None:
    outcome = attempts[0][name]["outcome"]
    expected = CASES[name][1]
    assert outcome == expected if isinstance(expected, str) else outcome in expected
    assert attempts[0][name]["seconds"] < LONGEST_SECONDS


def test_nothing_is_said_on_the_way(attempts: tuple[dict[str, Any], str]) -> None:
    assert [line for line in attempts[1].splitlines() if not line.startswith(LIBTIFF)] == []


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 60
