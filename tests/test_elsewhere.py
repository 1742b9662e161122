"""The same pipeline elsewhere: on real pictures, and on a cluster that somebody else started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import untrained
from command_lines import SHARED, TINY, result

from flows import cli, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.mark.skipif(
    not (SHARED / "noto-emoji").is_dir(), reason="the emoji dataset does not lie beside this checkout"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_pictures_with_transparency_and_no_grammar_run_to_their_report(tmp_path, monkeypatch, capsys):
    """Their stages in this process, untrained: `test_planted_secrets.py` trains on pairs without a grammar."""
    monkeypatch.setattr(
        runs, "run_stages", lambda plan, made, **_: {s.name: untrained.make(plan, s).seconds for s in made}
    )
    settings = {k: v for k, v in untrained.SETTINGS.items() if k != "source.count"} | {"source.limit": 150}
    chosen = [f"--set={path}={value}" for path, value in settings.items()]
    data = ["--data", str(SHARED / "noto-emoji")]
    assert cli.main(["run", "demo", "--json", *data, f"--root={tmp_path}", *chosen]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {stage["status"] for stage in printed["stages"]} == {"ran"}
    assert "prompt_accuracy" not in printed["metrics"] and "clip_score" in printed["metrics"]
    page = Path(printed["report"]).read_text()
    assert "Prompt accuracy" not in page and "Image variations" in page


def test_the_same_stages_run_on_an_existing_cluster_of_two_nodes(tmp_path, darkroom, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        settings = TINY | {"clip.num_workers": 2}
        address = f"--address={nodes.address}"
        printed = result(
            darkroom("run", "demo", "--json", "--until=clip", address, root=tmp_path, settings=settings)
        )
    finally:
        nodes.shutdown()
    assert [stage["status"] for stage in printed["stages"]] == ["ran"] * 2


def test_an_address_without_a_cluster_is_one_clear_sentence(darkroom, tmp_path):
    refused = darkroom("run", "demo", "--until=shard", "--address=127.0.0.1:1", root=tmp_path, settings=TINY)
    assert refused.returncode == 2
    assert "no Ray cluster answers there" in refused.stderr and "Traceback" not in refused.stderr
