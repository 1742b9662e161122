"""Dated partitions: what is there, what is missing, what is made already."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained
from pictures import add_pictures

from flows import cli, runs
from flows.planning import prepare_plan


@pytest.fixture
def days(tmp_path, monkeypatch) -> Path:
    """Pictures of three days, of which the second has none; stages run in this process."""
    monkeypatch.setattr(
        runs,
        "run_stages",
        lambda plan, stages, **_: {s.name: untrained.make(plan, s).seconds for s in stages},
    )
    for day, numbers in (("2026-03-01", range(4)), ("2026-03-03", range(4, 9))):
        (tmp_path / "days").mkdir(exist_ok=True)
        add_pictures(tmp_path / "days" / day, numbers)
    return tmp_path / "days"


def backfilled(days: Path, capsys, *options: str, code: int = 0) -> list[dict[str, str]]:
    line = ["backfill", "prepare", f"--data={days}", "--since=2026-03-01", "--until=2026-03-03", "--json"]
    assert cli.main([*line, f"--root={days.parent / 'runs'}", "--set=shard.image_size=32", *options]) == code
    return json.loads(capsys.readouterr().out)["partitions"]


def test_each_partition_is_made_once_in_order_and_what_is_missing_is_said(days, capsys):
    assert [p["state"] for p in backfilled(days, capsys, "--dry-run")] == ["pending", "missing", "pending"]
    assert not (days.parent / "runs").exists()
    first = backfilled(days, capsys)
    assert [(p["date"], p["state"]) for p in first] == [
        ("2026-03-01", "ran"), ("2026-03-02", "missing"), ("2026-03-03", "ran"),
    ]  # fmt: skip
    add_pictures(days / "2026-03-02", range(9, 12))
    again = backfilled(days, capsys, f"--data={days}/{{date}}")
    assert [p["state"] for p in again] == ["cached", "ran", "cached"]
    assert [again[i]["run"] for i in (0, 2)] == [first[i]["run"] for i in (0, 2)]


def test_a_partition_that_fails_is_said_and_the_next_one_is_made(days, capsys):
    for picture in (days / "2026-03-01").glob("*.png"):
        picture.write_bytes(b"no picture")
    states = backfilled(days, capsys, code=1)
    assert [p["state"] for p in states] == ["failed", "missing", "ran"]
    assert states[0]["reason"].endswith("can be used: 4 not_an_image")


@pytest.mark.slow
def test_a_recipe_that_trains_makes_one_system_per_date_and_makes_none_twice(days, capsys):
    for day, numbers in (("2026-03-01", range(60)), ("2026-03-03", range(60, 120))):
        add_pictures(days / day, numbers)
    root = str(days.parent / "runs")
    line = [
        "backfill",
        "demo",
        f"--data={days}",
        "--since=2026-03-01",
        "--until=2026-03-03",
        f"--root={root}",
        "--json",
    ]
    line += [f"--set={path}={value}" for path, value in untrained.SETTINGS.items() if path != "source.count"]
    assert cli.main(line) == 0
    first, missing, last = json.loads(capsys.readouterr().out)["partitions"]
    assert [each["state"] for each in (first, missing, last)] == ["ran", "missing", "ran"]
    assert first["run"] != last["run"] == runs.find(root, "latest")["run"]
    for each in (first, last):
        made = runs.find(root, each["run"])
        assert made["recipe"]["source"]["path"] == each["source"]
        assert "fd_clip" in made["metrics"] and Path(made["report"]).is_file()
    assert cli.main(line) == 0
    again = json.loads(capsys.readouterr().out)["partitions"]
    assert [each["state"] for each in again] == ["cached", "missing", "cached"]


def test_the_folder_of_all_dates_is_one_source_into_which_later_ones_grow(days):
    def plan():
        return prepare_plan(
            str(days),
            assignments=["shard.image_size=32"],
            root=str(days.parent / "runs"),
            retry_failed=False,
        )

    assert untrained.make(plan(), plan().stages[0]).samples == 9
    add_pictures(days / "2026-03-02", range(9, 12))
    (stage,) = plan().stages
    assert stage.reason == "3 new rows in 1 new shard"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--since=2026-03-05", "--until=2026-03-06"], "has nothing from 2026-03-05 to 2026-03-06"),
        (["--since=2026-03-05"], "--since 2026-03-05 is after --until 2026-03-03"),
    ],
)
def test_dates_without_anything_are_one_sentence(days, options, sentence, capsys):
    line = ["backfill", "prepare", f"--data={days}", "--since=2026-03-01", "--until=2026-03-03", *options]
    assert cli.main([*line, f"--root={days.parent}"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("dmo", [], "there is no recipe 'dmo'; did you mean demo?"),
        ("demo", ["--set=denoiser.max_step=5"], "did you mean denoiser.max_steps"),
        ("prepare", ["--root=nowhere://bucket/x"], "Protocol not known: nowhere"),
    ],
)
def test_what_no_date_would_mend_is_one_sentence(days, recipe, options, sentence, capsys):
    line = ["backfill", recipe, f"--data={days}", "--since=2026-03-01", "--until=2026-03-03"]
    assert cli.main([*line, f"--root={days.parent / 'runs'}", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and sentence in said.err and said.err.count("\n") == 1


def test_a_date_that_is_none_is_refused(days, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["backfill", "prepare", f"--data={days}", "--since=yesterday", "--until=2026-03-03"])
    assert ended.value.code == 2 and "yesterday is no date: write YYYY-MM-DD" in capsys.readouterr().err
