"""Conditions that an evaluation must meet, judged by intervals and never by a point.

    fd_clip <= 12              holds when the upper end of the 95 % interval does
    prompt_accuracy >= 0.9     holds when the lower end of the 95 % interval does
    not worse than demo-1a2b   fails when, for some metric that both runs have under one protocol, the paired interval of the
                               difference lies wholly on the worse side; fails too when no metric compares

So a bound is passed by evidence for it, and a comparison is lost by evidence against it: more images make a bound easier to
pass for a model that deserves it, and a regression harder to hide.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from training.metrics import catalogue
from training.metrics.comparison import Measured, difference
from training.metrics.protocol import differences
from training.metrics.scores import OF_THE_PARTS

METRICS = (*OF_THE_PARTS, *catalogue.METRICS)
_BOUND = re.compile(r"([\w.]+)\s*(<=|>=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)")
_AGAINST = re.compile(r"not worse than (\S+)")
_FORMS = "write 'METRIC <= NUMBER', 'METRIC >= NUMBER' or 'not worse than RUN'"


@dataclass(frozen=True, slots=True)
class Bound:
    """`metric` must lie at or below (`<=`), or at or above (`>=`), `limit`."""

    text: str
    metric: str
    sign: str
    limit: float


@dataclass(frozen=True, slots=True)
class Against:
    """No metric may be worse than in run `run`."""

    text: str
    run: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a gate held, and the value and interval by which it was judged."""

    gate: str
    held: bool
    reason: str


def parsed(text: str) -> Bound | Against:
    """The gate that `text` states. Raises ValueError saying what may be written."""
    text = " ".join(text.split())
    if found := _AGAINST.fullmatch(text):
        if found[1] == "latest":
            raise ValueError(f"gate {text!r}: latest moves with every run; name the run that is the baseline")
        return Against(text, found[1])
    found = _BOUND.fullmatch(text)
    if not found:
        raise ValueError(f"gate {text!r} cannot be read: {_FORMS}")
    metric, sign, number = found.groups()
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METRICS)}"
        raise ValueError(f"gate {text!r}: there is no metric {metric}; {hint}")
    try:
        limit = float(number)
    except ValueError as error:
        raise ValueError(f"gate {text!r}: {number} is no number; {_FORMS}") from error
    if not math.isfinite(limit):
        raise ValueError(f"gate {text!r}: {number} is beyond every number, so the gate would judge nothing")
    return Bound(text, metric, sign, limit)


def judge(
    gate: Bound | Against, scores: Mapping[str, Measured], baselines: Mapping[str, Mapping[str, Measured]]
) -> Verdict:
    """The verdict of `gate` on `scores`, by metric; `baselines` has the scores of each run that a gate names."""
    if isinstance(gate, Bound):
        return _bound(gate, scores.get(gate.metric))
    return _against(gate, scores, baselines[gate.run])


def _bound(gate: Bound, score: Measured | None) -> Verdict:
    if score is None:
        return Verdict(gate.text, False, f"{gate.metric} was not measured")
    held = score.high <= gate.limit if gate.sign == "<=" else score.low >= gate.limit
    return Verdict(
        gate.text,
        held,
        f"{gate.metric} is {score.value:.4g}, 95 % interval {score.low:.4g} to {score.high:.4g}",
    )


def _against(gate: Against, scores: Mapping[str, Measured], baseline: Mapping[str, Measured]) -> Verdict:
    shared = [name for name in scores if name in baseline]
    apart = {name: differences(baseline[name].protocol, scores[name].protocol) for name in shared}
    alike = {
        name: difference(baseline[name], scores[name])
        for name in shared
        if not apart[name] and scores[name].deletions is not None
    }
    # What measures the very same parts is equal, and no evidence where the rest cannot be held against each other.
    tells = [name for name in alike if baseline[name].protocol.weights != scores[name].protocol.weights]
    if not alike or (not tells and any(apart.values())):
        where = "; ".join(f"{name}: {places[0]}" for name, places in apart.items() if places)
        return Verdict(gate.text, False, f"no metric compares ({where or 'none is in both runs'})")
    worse = {name: d for name, d in alike.items() if d.verdict == "worse"}
    shown = worse or alike
    return Verdict(
        gate.text,
        not worse,
        ", ".join(
            f"{name} {'worse' if worse else 'differs'} by {d.value:+.4g}, 95 % interval {d.low:+.4g} to {d.high:+.4g}"
            for name, d in shown.items()
        ),
    )
