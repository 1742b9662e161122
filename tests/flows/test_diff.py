"""`darkroom diff`: where two runs differ, and what of it may not be subtracted."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained

from flows import cli, console
from flows.diff import _uncommon, diff

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def both(untrained_run, tmp_path_factory) -> tuple[str, str, str]:
    """(root, a run, the same with half as many pairs again and other guidance)."""
    root = tmp_path_factory.mktemp("both") / "root"
    shutil.copytree(untrained_run[0], root)
    changes = {"source__count": 90, "evaluate__guidance_scale": 3.0, "evaluate__metrics": "caption_recall_1"}
    other = untrained.finish(untrained.plan_of(root, fanout__num_workers=1, **changes))
    return str(root), untrained_run[1]["run"], other["run"]


def test_settings_data_scores_pictures_and_time_are_held_against_each_other(both):
    root, a, b = both
    found = diff(root, (a, "latest"), None)
    assert found["runs"] == [a, b]
    assert {row["path"]: (row["a"], row["b"], row["operational"]) for row in found["config"]} == {
        "source.count": (60, 90, False),
        "fanout.num_workers": (None, 1, True),
        "evaluate.guidance_scale": (2.0, 3.0, False),
        "evaluate.metrics": ([], ["caption_recall_1"], False),
    }
    data = found["data"]
    assert (data["samples"], data["added"], data["removed"]) == ([60, 90], 30, 0)
    assert (data["shards"], data["shared_shards"]) == ([2, 3], 2)
    assert found["samples"] == {"pictures": [26, 26], "same_prompts": 26, "same_noise": True}
    assert [row["stage"] for row in found["spend"]] == [
        stage.name for stage in untrained.plan_of(root).stages
    ]
    assert not any(row["shared"] for row in found["spend"])


def test_scores_of_two_protocols_are_shown_apart_and_never_subtracted(both):
    root, a, b = both
    metrics = diff(root, (a, b), None)["metrics"]
    assert metrics["metrics"] == [] and metrics["alone"] == {a: [], b: ["caption_recall_1"]}
    apart = {row["name"]: row for row in metrics["incomparable"]}
    assert apart["prompt_accuracy"]["differences"] == ["guidance_scale 2.0 and 3.0"]
    assert all("against_first" not in row for row in apart.values())


@pytest.mark.slow
def test_the_same_data_in_shards_of_another_size_is_the_same_data(both, tmp_path):
    root, a, _ = both
    root = shutil.copytree(root, tmp_path / "root")
    other = untrained.finish(untrained.plan_of(root, shard__samples_per_shard=20, evaluate__seed=1))["run"]
    found = diff(str(root), (a, other), None)
    data = found["data"]
    assert (data["shared_shards"], data["added"], data["removed"]) == (0, 0, 0)
    assert found["samples"]["same_noise"] is False


def test_what_one_run_no_longer_has_is_null(both, tmp_path):
    root = Path(shutil.copytree(both[0], tmp_path / "moved"))
    for stage in ("shard", "evaluate", "generate"):
        shutil.rmtree(root / "store" / stage)
    found = diff(str(root), (both[1], both[2]), None)
    assert found["data"] is found["metrics"] is found["samples"] is None
    assert cli.main(["diff", both[1], both[2], f"--root={root}"]) == 0


def test_the_page_holds_both_pictures_of_each_prompt_and_asks_for_nothing(
    both, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(console, "out", Console(highlight=False, width=console.PIPE_WIDTH))
    root, a, b = both
    page = tmp_path / "pages" / "diff.html"
    assert cli.main(["diff", a, b, f"--root={root}", f"--out={page}"]) == 0
    said, text = capsys.readouterr().out, page.read_text()
    assert "source.count" in said and "30 samples added, 0 removed; 2 shards in common" in said
    assert re.search(r"fd_clip +\S+ \(\S+ – \S+\) +\S+ \(\S+ – \S+\) +another protocol", said)
    pictures = re.findall(
        r'<img src="data:image/png;base64,[^"]+" width="128" alt="([^"]+), by ([^"]+)">', text
    )
    assert len(pictures) == 48 and pictures[0] == (pictures[1][0], a) and pictures[1][1] == b
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "another protocol: guidance_scale 2.0 and 3.0" in text


def test_the_page_has_the_difference_of_what_compares(both, tmp_path):
    root = Path(shutil.copytree(both[0], tmp_path / "root"))
    other = untrained.finish(untrained.plan_of(root, evaluate__guidance_scale=3.0))["run"]
    assert cli.main(["diff", both[1], other, f"--root={root}", f"--out={tmp_path / 'diff.html'}"]) == 0
    text = (tmp_path / "diff.html").read_text()
    assert "another protocol: guidance_scale 2.0 and 3.0" in text
    assert re.search(r"<td>vae_psnr</td>.*?<td>\+0 \(\+0 to \+0\) undecided</td>", text, re.DOTALL)


def test_in_json_it_is_the_only_line(both, capsys):
    root, a, b = both
    assert cli.main(["diff", a, b, f"--root={root}", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert set(json.loads(printed)) == {"runs", "config", "data", "metrics", "samples", "spend"}


@pytest.mark.parametrize(
    ("other", "sentence"), [("nowhere", "there is no run"), ("demo", "are the same run")]
)
def test_a_mistake_is_one_sentence(both, capsys, other, sentence):
    root, a, _ = both
    assert cli.main(["diff", a, other.replace("demo", a), f"--root={root}"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_no_prompt_in_common_is_no_page(both, tmp_path, capsys):
    root = Path(shutil.copytree(both[0], tmp_path / "other"))
    for prompts in (root / "store/generate").glob("*/_meta/prompts.jsonl"):
        prompts.write_text(prompts.read_text().replace('"text":"', f'"text":"{prompts.parts[-3]} '))
    assert cli.main(["diff", both[1], both[2], f"--root={root}", f"--out={tmp_path}/page.html"]) == 2
    assert "drew no prompt in common" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_equal_rows_are_counted_as_often_as_they_occur():
    rows = [np.array(each, np.uint64) for each in ([1, 1, 1, 2], [1, 2, 2, 2**63])]
    assert _uncommon(*rows) == (2, 2)
    assert _uncommon(rows[0], np.zeros(0, np.uint64)) == (4, 0)
