"""Log lines: sentences for people, objects with their place for programs."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from data.errors import UserError
from stages import logs


@pytest.fixture
def speaking(monkeypatch):
    """(form) sets the logger `darkroom` up in that form, until the test is over."""
    log = logging.getLogger("darkroom")
    before = log.handlers[:], log.propagate, log.level

    def in_form(form: str) -> None:
        monkeypatch.setenv("DARKROOM_LOG", form)
        logs.set_up()

    yield in_form
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


def test_without_the_variable_a_line_is_its_sentence(speaking, capsys):
    speaking("")
    with logs.at(run="demo-1", stage="embed"):
        logging.getLogger("darkroom.shards").warning("shard %05d failed", 3, extra={"shard": 3})
        logging.getLogger("darkroom.shards").debug("not said")
    assert capsys.readouterr().err == "shard 00003 failed\n"


def test_with_json_a_line_names_its_run_stage_and_shard(speaking, capsys):
    speaking("json")
    with logs.at(run="demo-1", stage="embed"), logs.at(shard=7):
        logging.getLogger("darkroom.shards").debug("done")
        logging.getLogger("darkroom.shards").debug("done", extra={"shard": 8})
    logging.getLogger("darkroom").warning("zwei\nZeilen ü")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert (
        first.items()
        >= {"run": "demo-1", "stage": "embed", "shard": 7, "level": "debug", "message": "done"}.items()
    )
    assert first["logger"] == "darkroom.shards" and first["time"].endswith("+00:00")
    assert second["shard"] == 8, "what the line itself says goes before its surroundings"
    assert third["message"] == "zwei\nZeilen ü" and not {"run", "stage", "shard"} & third.keys()


def test_an_exception_is_part_of_its_line(speaking, capsys):
    speaking("json")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("darkroom").exception("it failed")
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["level"] == "error" and line["error"].endswith("ValueError: broken")


def test_a_place_ends_with_its_block_and_is_no_other_threads():
    with logs.at(run="a"):
        with logs.at(stage="b"):
            assert logs.place() == {"run": "a", "stage": "b"}
        assert logs.place() == {"run": "a"}
        seen = []
        thread = threading.Thread(target=lambda: seen.append(dict(logs.place())))
        thread.start()
        thread.join()
    assert seen == [{}] and logs.place() == {}


def test_another_form_is_refused_in_one_sentence(speaking):
    with pytest.raises(UserError, match="DARKROOM_LOG=yaml: only json is known"):
        speaking("yaml")
