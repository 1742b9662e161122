"""What the process of Ray's controller loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_the_controller_imports_of_ours_brings_no_torch_in():
    line = "import stages.trainer, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parents[2], check=True, timeout=120)
