"""A journal's lines: written between others, read back as what was told, and nothing else taken for them."""

from __future__ import annotations

import errno

import pytest

from data.errors import GateFailed, StageFailed, UserError
from stages import journal
from stages.journal import Failed, Journal, Moved


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_progress_is_read_back_as_it_was_told(capsys):
    Journal()(3, 10, "steps", 'loss 0.1 "\n')
    (line,) = lines(capsys)
    assert journal.parsed(line + "\n") == Moved(done=3, total=10, unit="steps", note='loss 0.1 "\n')


def test_progress_is_told_once_a_second_and_at_the_end(capsys):
    tell = Journal()
    for done in range(1, 101):
        tell(done, 100, "samples")
    assert [journal.parsed(line).done for line in lines(capsys)] == [1, 100]


@pytest.mark.parametrize(
    "error", [UserError("set a"), GateFailed("m is 3"), StageFailed("row 1"), FloatingPointError("step 7")]
)
def test_an_error_with_a_sentence_of_its_own_comes_back_as_itself(capsys, error):
    Journal().failed(error)
    back = journal.parsed(lines(capsys)[0]).error()
    assert (type(back), str(back)) == (type(error), str(error))


def test_a_full_disk_comes_back_with_its_place(capsys):
    Journal().failed(OSError(errno.ENOSPC, "No space left on device", "/store/a"))
    back = journal.parsed(lines(capsys)[0]).error()
    assert isinstance(back, OSError) and (back.errno, back.filename) == (errno.ENOSPC, "/store/a")


def test_an_error_that_nobody_planned_is_a_failed_stage_that_quotes_it(capsys):
    Journal().failed(KeyError("a"))
    back = journal.parsed(lines(capsys)[0]).error()
    assert type(back) is StageFailed and "KeyError: 'a'" in str(back)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "a",
        "darkroom:moved",
        'darkroom:moved {"done":1',
        'darkroom:other {"kind":"a","message":"b"}',
        "x darkroom:failed {}",
    ],
)
def test_other_lines_and_halves_of_lines_tell_nothing(line):
    assert journal.parsed(line) is None


def test_an_unknown_field_is_of_another_version_and_tells_nothing():
    assert journal.parsed('darkroom:failed {"kind":"a","message":"b","more":1}') is None
    assert journal.parsed('darkroom:failed {"kind":"a","message":"b"}') == Failed(kind="a", message="b")
