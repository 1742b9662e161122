"""The page of a run whose encoders no stage of it made."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained


def test_a_run_with_encoders_made_elsewhere_ends_with_its_page(untrained_run, tmp_path):
    _, record = untrained_run
    uri = {stage["name"]: stage["uri"] for stage in record["stages"]}
    plan = untrained.plan_of(tmp_path, clip__pretrained=uri["clip"], vae__pretrained=uri["vae"])
    page = Path(untrained.finish(plan)["report"]).read_text()
    assert "Which artifact was made from which" in page
