"""Gates are judged by intervals: a bound needs evidence for it, a comparison evidence against it."""

from __future__ import annotations

import numpy as np
import pytest

from training.metrics.comparison import Measured
from training.metrics.gates import Against, Bound, judge, parsed
from training.metrics.intervals import Estimate
from training.metrics.protocol import Protocol

NOISE = np.random.default_rng(3).normal(size=64)


def clip_score(mean: float, noise=NOISE, **protocol) -> dict[str, Measured]:
    values = mean + noise
    made = Protocol(**({"metric": "clip_score", "n": 64, "weights": {"x": str(mean)}} | protocol))
    row = Measured(
        name="clip_score", value=mean, low=mean - 0.1, high=mean + 0.1, n=64, better="higher", meaning="",
        protocol=made, deletions=Estimate.of_mean(values).deletions,
    )  # fmt: skip
    return {"clip_score": row}


def test_gates_are_read_as_people_write_them():
    assert parsed("fd_clip<=12") == Bound("fd_clip<=12", "fd_clip", "<=", 12.0)
    assert parsed("  clip_score  >=  2.5e-1 ") == Bound("clip_score >= 2.5e-1", "clip_score", ">=", 0.25)
    assert parsed("not  worse than demo-1") == Against("not worse than demo-1", "demo-1")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fd_clip < 12", "cannot be read: write 'METRIC <= NUMBER'"),
        ("fd_clip <= low", "cannot be read"),
        ("fd_clip <= 1.2.3", "1.2.3 is no number"),
        ("fd_clip <= 1e999", "beyond every number"),
        ("fd_clop <= 12", "there is no metric fd_clop; did you mean fd_clip"),
        ("zzz <= 12", "there are prompt_accuracy, "),
        ("not worse than", "cannot be read"),
        ("not worse than latest", "name the run that is the baseline"),
        ("", "cannot be read"),
    ],
)
def test_a_malformed_gate_says_what_may_be_written(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parsed(text)


@pytest.mark.parametrize(
    ("gate", "held"),
    [
        ("clip_score >= 0.3", True),
        ("clip_score >= 0.35", False),  # the value reaches it, the interval's lower end does not
        ("clip_score <= 0.5", True),
        ("clip_score <= 0.45", False),
        ("fid <= 100", False),  # not measured
    ],
)
def test_a_bound_holds_when_the_far_end_of_the_interval_does(gate, held):
    verdict = judge(parsed(gate), clip_score(0.4), {})
    assert verdict.held is held
    assert ("was not measured" if "fid" in gate else "0.4, 95 % interval 0.3 to 0.5") in verdict.reason


def test_not_worse_is_lost_only_by_a_paired_interval_on_the_worse_side():
    gate, baselines = parsed("not worse than base"), {"base": clip_score(0.4)}
    assert judge(gate, clip_score(0.4), baselines).held
    assert judge(gate, clip_score(0.41), baselines).held
    lost = judge(gate, clip_score(0.39), baselines)
    assert not lost.held and "clip_score worse by -0.01" in lost.reason
    unlike = np.random.default_rng(4).normal(size=64)
    assert judge(gate, clip_score(0.39, unlike), baselines).held, "unpaired noise is no evidence"


def test_not_worse_is_lost_when_nothing_compares():
    lost = judge(parsed("not worse than base"), clip_score(0.4, n=32), {"base": clip_score(0.4)})
    assert not lost.held and "no metric compares (clip_score: n 64 and 32)" in lost.reason
    assert "none is in both runs" in judge(parsed("not worse than base"), {}, {"base": {}}).reason


def test_scores_of_the_very_same_parts_say_nothing_where_what_was_changed_does_not_compare():
    """Two runs that differ in guidance alone: their VAE is one, and cannot be worse than itself."""
    vae = {"vae_psnr": clip_score(0.9, metric="vae_psnr", weights={"vae": "one"})["clip_score"]}
    run = vae | clip_score(0.3, guidance_scale=3.0)
    baseline = vae | clip_score(0.5, guidance_scale=2.0)
    verdict = judge(parsed("not worse than demo-1"), run, {"demo-1": baseline})
    assert not verdict.held
    assert "no metric compares (clip_score: guidance_scale 2.0 and 3.0" in verdict.reason


def test_a_run_is_not_worse_than_itself():
    run = clip_score(0.3)
    assert judge(parsed("not worse than demo-1"), run, {"demo-1": run}).held
