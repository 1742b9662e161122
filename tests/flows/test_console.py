"""What people see: whole words at 80 and 120 columns, and in a pipe."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from data.manifest import FileRecord, publish_snapshot
from flows import console
from flows.plan_table import show_plan

SCORES = [
    {
        "name": "prompt_accuracy_heldout",
        "value": 0.91234,
        "low": 0.8812,
        "high": 0.9401,
        "better": "higher",
        "n": 30_000,
        "meaning": "share of generated images that show every attribute of a prompt that training never saw",
    },
    {
        "name": "cmmd",
        "value": 12.5,
        "low": 1.25e-7,
        "high": 1.75e5,
        "better": "lower",
        "n": 500,
        "meaning": "[x] kernel",
    },
]


def shown(monkeypatch: pytest.MonkeyPatch, width: int, draw) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=stream, width=width, highlight=False))
    draw()
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_cuts_no_word_and_fits(plan_of, publish, monkeypatch, width):
    publish(plan_of().stages)
    plan = plan_of(
        "denoiser.learning_rate=0.0123",
        "denoiser.caption_drop=0.765",
        "denoiser.weight_decay=0.0321",
        "prior.num_layers=9",
    )
    text = shown(monkeypatch, width, lambda: show_plan(plan, plan.stages))
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for stage in plan.stages:
        assert f" {stage.name} " in text and stage.fingerprint in text
    for word in ("denoiser.learning_rate", "denoiser.weight_decay", "0.765", "0.0123"):
        assert word in text
    assert plan.run in text and "5 of 10 stages to run, about 8:20 min" in text


def test_a_plan_tells_what_it_will_take_and_cost_where_that_is_known(plan_of, publish, monkeypatch):
    prices = ("prices.cpu_hour=0.5", "prices.currency=EUR")
    publish(plan_of().stages)
    plan = plan_of("prior.learning_rate=0.0123", *prices)
    told = "4 of 10 stages to run, about 6:40 min, 0.2 CPU-hours, 0.1 EUR"
    narrow = shown(monkeypatch, 100, lambda: show_plan(plan, plan.stages))
    assert told in narrow and "~0.05 CPU-hours" not in narrow
    wide = shown(monkeypatch, 140, lambda: show_plan(plan, plan.stages))
    assert told in wide and wide.count("~0.05 CPU-hours") == wide.count("~0.025 EUR") == 4
    plan = plan_of("prior.learning_rate=0.0123")
    assert "EUR" not in shown(monkeypatch, 140, lambda: show_plan(plan, plan.stages))


def test_a_plan_tells_how_many_bytes_it_will_write(plan_of, publish, monkeypatch):
    made = publish(plan_of("evaluate.num_images=300").stages)["generate"]
    file = FileRecord(path="a", bytes=2_000_000, sha256="0" * 64)
    publish_snapshot(made.folder, made.model_copy(update={"files": (file,)}))
    plan = plan_of("evaluate.num_images=900")
    wide = shown(monkeypatch, 140, lambda: show_plan(plan, plan.stages))
    assert "CPU-hours, 6 MB" in wide and wide.count("~6 MB") == 1
    row = next(stage.as_json() for stage in plan.stages if stage.name == "generate")
    assert row["bytes"] == 6_000_000


def test_a_plan_shows_the_stages_asked_for(plan_of, monkeypatch):
    plan = plan_of()
    text = shown(monkeypatch, 80, lambda: show_plan(plan, plan.stages[:1]))
    assert "1 of 1 stages to run" in text and "denoiser" not in text


def test_a_full_store_is_said_in_words(plan_of, publish, monkeypatch):
    publish(plan_of().stages)
    plan = plan_of()
    assert "everything is cached" in shown(monkeypatch, 80, lambda: show_plan(plan, plan.stages))


def test_a_plan_says_which_weights_come_from_elsewhere(plan_of, monkeypatch):
    plan = plan_of("clip.pretrained=ViT-L-14/openai")
    text = shown(monkeypatch, 80, lambda: show_plan(plan, plan.stages))
    assert "clip weights: ViT-L-14/openai (downloaded when the run starts" in text


@pytest.mark.parametrize("width", [80, 120])
def test_scores_keep_their_names_values_and_intervals(monkeypatch, width):
    text = shown(monkeypatch, width, lambda: console.out.print(console.scores_table(SCORES)))
    assert all(len(line) <= width for line in text.splitlines())
    for part in (
        "prompt_accuracy_heldout ↑",
        "0.9123",
        "0.8812 – 0.9401",
        "cmmd ↓",
        "1.25e-07 – 1.75e+05",
        "30000",
    ):
        assert part in text
    assert ("share of generated" in text) is (width >= console.MEANING_WIDTH)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.9, "1:00 min"),
        (185, "3:05 min"),
        (3599.9, "1:00 h"),
        (7620, "2:07 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert console.duration(seconds) == text


def test_what_a_library_prints_goes_to_stderr(capsys):
    with console.quiet_stdout():
        sys.stdout.write("chatter\n")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "chatter\n"
