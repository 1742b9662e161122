"""The Pareto front of a sweep, and its marked point."""

from __future__ import annotations

from training.metrics.tradeoff import Point, Sweep, curve, curves


def point(setting: float, fd: float, fit: float, **more: float) -> Point:
    scores = {"fd_clip": fd, "clip_score": fit} | more
    return Point(setting=setting, scores={name: (v, v, v) for name, v in scores.items()})


def test_the_front_has_what_no_other_setting_beats_in_both():
    points = [
        point(1, 5.0, 0.2),
        point(2, 3.0, 0.3),
        point(3, 4.0, 0.4),
        point(5, 4.5, 0.35),
        point(8, 6, 0.5),
    ]
    found = curve(points, "fd_clip")
    assert found.pareto == (2, 3, 8), "1 is beaten by 2, and 5 by 3"
    assert found.best == 2


def test_equal_points_share_the_front_and_of_equal_distances_the_better_fit_is_best():
    assert curve([point(1, 2.0, 0.3), point(2, 2.0, 0.3)], "fd_clip").pareto == (1, 2)
    tied = curve([point(1, 2.0, 0.3), point(2, 2.0, 0.4)], "fd_clip")
    assert (tied.pareto, tied.best) == ((2,), 2)


def test_a_distance_that_some_point_lacks_has_no_curve():
    points = [point(1, 2.0, 0.3, fid=9.0), point(2, 1.0, 0.4)]
    assert [c.distance for c in curves(points)] == ["fd_clip"]
    assert [c.distance for c in curves(points[:1])] == ["fd_clip", "fid"]


def test_of_seeds_none_is_best_and_the_spread_is_that_of_what_differs():
    points = [point(seed, fd, 0.3, clip_score=0.3) for seed, fd in ((0, 1.0), (1, 2.0), (2, 3.0))]
    found = Sweep.of("seed", points)
    assert found.curves == () and found.spread == {"fd_clip": (2.0, 1.0)}
    assert Sweep.of("seed", points[:1]).spread == {}
    assert Sweep.of("guidance_scale", points).curves and not Sweep.of("guidance_scale", points).spread
