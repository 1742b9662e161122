"""Growth: what a state of the source adds to what its shards already attempted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import growth, storage
from data.errors import CorruptArtifact
from data.growth import FAILED, FILTERED, WRITTEN, KnownRows
from data.manifest import Ledger, Snapshot

STATES = {WRITTEN: "", FILTERED: "too_small", FAILED: "timeout"}


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def attempted(identities: np.ndarray, states: list[int] | None = None) -> KnownRows:
    nothing = growth.nothing_known()
    change = growth.growth(nothing, identities)
    assert change is not None
    outcomes = [(state, STATES[state]) for state in states or [WRITTEN] * len(identities)]
    return growth.grown(nothing, change, identities, outcomes)


def test_of_an_unknown_source_every_row_is_new():
    change = growth.growth(growth.nothing_known(), ids(5, 3, 9))
    assert change is not None and change.new.tolist() == [0, 1, 2] and len(change.superseded) == 0


def test_the_same_rows_in_any_order_add_nothing():
    change = growth.growth(attempted(ids(5, 3, 9)), ids(9, 5, 3))
    assert change is not None and len(change.new) == 0 and len(change.superseded) == 0


def test_new_rows_are_found_wherever_they_stand_and_keep_the_order_of_the_source():
    change = growth.growth(attempted(ids(5, 3)), ids(8, 5, 1, 3))
    assert change is not None and change.new.tolist() == [0, 2]


def test_a_written_row_that_is_gone_or_changed_ends_the_lineage():
    assert growth.growth(attempted(ids(5, 3)), ids(5)) is None
    assert growth.growth(attempted(ids(5, 3)), ids(5, 4)) is None


def test_a_failed_row_may_change_and_is_attempted_as_the_new_one():
    known = attempted(ids(5, 3), [WRITTEN, FAILED])
    change = growth.growth(known, ids(5, 4))
    assert change is not None and change.new.tolist() == [1] and change.superseded.tolist() == [1]


def test_equal_rows_are_counted_and_not_merged():
    known = attempted(ids(5, 7, 7), [WRITTEN, FAILED, FAILED])
    change = growth.growth(known, ids(5, 7, 7, 7))
    assert change is not None and change.new.tolist() == [3]


def test_only_failures_of_the_wanted_reasons_are_tried_again_and_then_count_once():
    known = attempted(ids(1, 2, 3), [WRITTEN, FAILED, FILTERED])
    again = known.of_reasons({"timeout", "http_503"})
    assert again.tolist() == [1] and known.of_reasons({"too_small"}).tolist() == []
    change = growth.growth(known, ids(1, 2, 3), again)
    assert change is not None and change.new.tolist() == [1]
    after = growth.grown(known, change, ids(1, 2, 3), [(WRITTEN, "")])
    assert after.superseded == Ledger(failed={"timeout": 1})
    assert after.of_reasons({"timeout"}).tolist() == []


@given(st.lists(st.integers(0, 30), max_size=40), st.lists(st.integers(0, 30), max_size=40), st.data())
def test_growing_step_by_step_knows_each_row_of_the_source_once(first, more, data):
    identities = ids(*first)
    states = data.draw(
        st.lists(st.sampled_from([WRITTEN, FILTERED, FAILED]), min_size=len(first), max_size=len(first))
    )
    known = attempted(identities, states)
    source = data.draw(st.permutations([*first, *more]))
    change = growth.growth(known, ids(*source))
    assert change is not None and len(change.new) == len(more)
    after = growth.grown(known, change, ids(*source), [(WRITTEN, "")] * len(change.new))
    live = after.rows[~after.rows["superseded"]]["identity"]
    assert sorted(live.tolist()) == sorted(source)
    assert (after.rows[: len(first)]["identity"] == identities).all()


def test_rows_come_back_from_disk_and_damage_is_named(tmp_path):
    known = attempted(ids(1, 2), [WRITTEN, FAILED])
    growth.save(str(tmp_path), "abc", known)
    snapshot = Snapshot(
        stage="shard",
        version=1,
        fingerprint="abc",
        config={},
        facts={"reasons": list(known.reasons)},
        folder=str(tmp_path),
    )
    loaded = growth.load(snapshot)
    assert (loaded.rows == known.rows).all() and loaded.reasons == known.reasons
    storage.write_bytes(str(tmp_path / growth.rows_path("abc")), b"\x93NUMPY")
    with pytest.raises(CorruptArtifact, match=r"abc\.npy"):
        growth.load(snapshot)
