"""Configs: what names a computation is every field that may change its result, and nothing else."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.config import Config, canonical_json, fingerprint, listed, operational, result_fields


class Optimizer(Config):
    rate: float = 0.1
    threads: int = operational(1)


class Training(Config):
    steps: int = 10
    workers: int = operational(1)
    optimizer: Optimizer = Optimizer()
    phases: tuple[Optimizer, ...] = ()
    named: dict[str, Optimizer] = {}
    spare: Optimizer | None = None


OPTIMIZERS = st.builds(Optimizer, rate=st.floats(0.1, 1), threads=st.integers(1, 9))
TRAININGS = st.builds(
    Training,
    steps=st.integers(1, 99),
    workers=st.integers(1, 99),
    optimizer=OPTIMIZERS,
    phases=st.lists(OPTIMIZERS, max_size=2).map(tuple),
    named=st.dictionaries(st.sampled_from("ab"), OPTIMIZERS),
    spare=st.none() | OPTIMIZERS,
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x, max_size=4))


def _without_operational(config: Training) -> Training:
    def bare(optimizer: Optimizer) -> Optimizer:
        return optimizer.model_copy(update={"threads": 1})

    return config.model_copy(
        update={
            "workers": 1,
            "optimizer": bare(config.optimizer),
            "phases": tuple(map(bare, config.phases)),
            "named": {name: bare(optimizer) for name, optimizer in config.named.items()},
            "spare": config.spare and bare(config.spare),
        }
    )


@given(TRAININGS, TRAININGS)
def test_configs_share_a_fingerprint_exactly_when_they_differ_in_operational_fields_alone(
    one: Training, other: Training
) -> None:
    assert fingerprint(one) == fingerprint(_without_operational(one)) == fingerprint(result_fields(one))
    same = _without_operational(one) == _without_operational(other)
    assert (fingerprint(one) == fingerprint(other)) is same


def test_no_operational_field_is_among_the_result_fields_at_any_depth() -> None:
    config = Training(phases=(Optimizer(),), named={"a": Optimizer()}, spare=Optimizer())
    assert result_fields(config) == {
        "steps": 10,
        "optimizer": {"rate": 0.1},
        "phases": [{"rate": 0.1}],
        "named": {"a": {"rate": 0.1}},
        "spare": {"rate": 0.1},
    }


@given(JSON)
def test_canonical_json_reads_back_as_what_was_written_and_is_one_way_of_writing_it(value: Any) -> None:
    payload = canonical_json(value)
    assert json.loads(payload) == value
    assert canonical_json(json.loads(payload)) == payload


def test_canonical_json_depends_on_neither_order_nor_kind_of_collection() -> None:
    assert canonical_json({"b": (1, 2), "a": {3, 1}}) == canonical_json({"a": [1, 3], "b": [1, 2]})
    assert canonical_json({"b": (1, 2), "a": {3, 1}}) == b'{"a":[1,3],"b":[1,2]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": [value]})
    with pytest.raises(ValidationError, match="finite"):
        Optimizer(rate=value)


def test_a_fingerprint_is_twelve_hex_digits_and_knows_where_its_parts_end() -> None:
    assert re.fullmatch("[0-9a-f]{12}", fingerprint("a", "b"))
    assert (
        len({fingerprint("a", "b"), fingerprint("ab"), fingerprint("b", "a"), fingerprint(["a", "b"])}) == 4
    )


def test_a_config_is_closed_and_frozen() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Optimizer.model_validate({"rat": 0.2})
    with pytest.raises(ValidationError, match="frozen"):
        Optimizer().rate = 0.2


def test_a_list_is_a_json_array_or_words_between_commas_and_a_torn_one_says_what_to_write() -> None:
    assert listed('["a, b", "c"]') == ["a, b", "c"] and listed("a,b") == ["a", "b"]
    with pytest.raises(ValueError, match=r"^\[ is no JSON array .* write words between commas"):
        listed("[")
