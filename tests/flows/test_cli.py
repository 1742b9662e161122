"""The command line: frozen, taught by --help, and honest in its exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.commands import using

CHECKOUT = Path(__file__).parents[2]
COMMON = {"--root", "--set", "--json", "--verbose"}
FROZEN = {
    "plan": (["recipe"], COMMON | {"--data", "--check", "--retry-failed"}),
    "run": (["recipe"], COMMON | {"--data", "--only", "--until", "--address", "--retry-failed"}),
    "submit": (["recipe"], COMMON | {"--data", "--address", "--retry-failed"}),
    "prepare": (["source"], COMMON | {"--address", "--retry-failed"}),
    "generate": (["run", "prompts"], {"--count", "--seed", "--guidance-scale", "--steps", "--out", "--root"}),
    "score": (
        [],
        {
            "--real",
            "--fake",
            "--metrics",
            "--extractor",
            "--save-real",
            "--json",
            "--features",
            "--images-per-prompt",
        },
    ),
    "export": (["run", "out"], {"--root"}),
    "verify": (["uri"], {"--json", "--repair", "--address"}),
    "index": (["uri"], {"--kind", "--out"}),
    "report": (["run"], {"--root"}),
    "evaluate": (["run"], {"--sweep", "--json", "--verbose", "--root", "--address"}),
    "compare": (["runs"], {"--vary", "--json", "--root"}),
    "diff": (["run", "other"], {"--out", "--json", "--root"}),
    "recipes": ([], set()),
    "status": ([], {"--json", "--root"}),
    "lineage": (["place"], {"--json", "--root"}),
    "gc": ([], {"--dry-run", "--keep-runs", "--forget", "--older-than", "--json", "--root"}),
    "pin": (["run"], {"--off", "--root"}),
    "promote": (["run"], {"--force", "--root"}),
    "rollback": ([], {"--root"}),
    "deploy": ([], {"--file", "--prune", "--root", "--address", "--json"}),
    "serve": ([], {"--file", "--prune", "--root", "--address", "--port", "--home"}),
    "backfill": (
        ["recipe"],
        COMMON | {"--data", "--since", "--until", "--dry-run", "--address", "--retry-failed"},
    ),
}
"""Command -> (positionals, options). What is here is what people and scripts type: add, never change."""


def commands() -> dict[str, argparse.ArgumentParser]:
    return next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_the_command_line_is_frozen():
    found = {}
    for name, sub in commands().items():
        actions = [action for action in sub._actions if action.dest != "help"]
        positionals = [action.dest for action in actions if not action.option_strings]
        found[name] = (positionals, {option for action in actions for option in action.option_strings})
    assert found == FROZEN


@pytest.mark.parametrize("name", FROZEN)
def test_every_command_has_what_carries_it_out(name: str):
    assert cli._command(name).__name__ == name


def test_defaults_are_frozen():
    parse = cli.parser().parse_args
    run = parse(["run", "demo"])
    assert (run.root, run.address, run.assignments, run.data) == ("./runs", "local", [], None)
    drawn = parse(["generate", "latest", "a star"])
    assert (drawn.count, drawn.seed, drawn.guidance_scale, drawn.steps, drawn.out) == (
        1,
        0,
        None,
        None,
        "generated",
    )


@pytest.mark.parametrize("command", [[], *([name] for name in FROZEN)])
def test_help_teaches_every_option(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    if not command:
        assert all(name in text for name in FROZEN) and "examples:" in text and "exit codes: 0 done" in text
        return
    sub = commands()[command[0]]
    assert sub.description
    for action in sub._actions:
        assert action.help or action.metavar in ("PROMPT", "URI"), f"{action.dest} is not explained"


@pytest.mark.parametrize(
    "line", [[], ["develop"], ["plan"], ["plan", "demo", "--sett", "a=1"], ["generate", "latest"]]
)
def test_a_wrong_command_line_is_exit_code_2(line, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 2
    assert "darkroom" in capsys.readouterr().err


def test_a_plan_in_json_is_the_only_thing_on_stdout(tmp_path, capsys):
    assert cli.main(["plan", "demo", "--json", f"--root={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    document = json.loads(printed)
    assert set(document) == {"recipe", "stages"} and document["recipe"] == "demo"
    assert all(
        set(stage) == {"name", "fingerprint", "status", "reason", "uri", "seconds", "device_seconds", "bytes"}
        for stage in document["stages"]
    )
    assert {stage["status"] for stage in document["stages"]} == {"pending"}
    assert document["stages"][0]["uri"].startswith(f"{tmp_path}/store/shard/")


def test_check_is_exit_code_1_while_anything_is_pending(plan_of, publish, tmp_path, capsys):
    check = ["plan", "demo", "--check", f"--root={tmp_path}"]
    assert cli.main(check) == 1
    publish(plan_of().stages)
    assert cli.main(check) == 0
    assert "everything is cached" in capsys.readouterr().out


def test_a_changed_learning_rate_makes_the_denoiser_and_what_follows_pending(
    plan_of, publish, tmp_path, capsys
):
    publish(plan_of().stages)
    assert (
        cli.main(["plan", "demo", "--json", f"--root={tmp_path}", "--set", "denoiser.learning_rate=1e-3"])
        == 0
    )
    stages = json.loads(capsys.readouterr().out)["stages"]
    pending = {stage["name"]: stage["reason"] for stage in stages if stage["status"] == "pending"}
    assert list(pending) == ["denoiser", "generate", "evaluate", "report"]
    assert pending["denoiser"] == "denoiser.learning_rate changed (0.0012 → 0.001)"


def test_a_run_with_nothing_to_do_says_so_and_starts_nothing(plan_of, publish, tmp_path, capsys):
    publish(plan_of().stages)
    before = set(sys.modules)
    assert cli.main(["run", "demo", f"--root={tmp_path}", "--until=encode"]) == 0
    assert "nothing to do: every stage is cached" in capsys.readouterr().out
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("ray", "prefect")}
    assert cli.main(["run", "demo", "--json", f"--root={tmp_path}", "--until=encode"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"run", "root", "stages", "metrics", "report"}
    assert [set(stage) for stage in record["stages"]] == [{"name", "status", "seconds", "uri"}] * 5
    assert (tmp_path / record["run"] / "run.json").is_file() and (tmp_path / "latest").read_text() == record[
        "run"
    ]


def test_recipes_lists_each_with_its_sentence(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["demo", "unclip"]


def test_a_path_with_brackets_is_printed_as_it_is(tmp_path, capsys):
    root = tmp_path / "[bold]x[/bold]"
    (root / "demo-1").mkdir(parents=True)
    (root / "demo-1" / "run.json").write_text(
        json.dumps({"run": "demo-1", "report": f"{root}/demo-1/report.html"})
    )
    assert cli.main(["report", "demo-1", f"--root={root}"]) == 0
    assert capsys.readouterr().out == f"{root}/demo-1/report.html\n"


def test_ctrl_c_is_exit_code_130_and_says_what_resumes(monkeypatch, capsys):
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(using, "recipes", interrupted)
    assert cli.main(["recipes"]) == 130
    assert capsys.readouterr().err == "darkroom: stopped; the same command resumes\n"


def test_a_reader_that_closes_the_pipe_early_sees_no_traceback(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        line = [sys.executable, "-m", "flows.cli", "plan", "demo", "--json", f"--root={tmp_path}"]
        finished = subprocess.run(
            line, cwd=CHECKOUT, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert finished.returncode == 1 and finished.stderr == ""
