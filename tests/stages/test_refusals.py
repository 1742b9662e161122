"""What a training refuses whatever the cluster: each with what was given and what would do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from data.errors import UserError
from stages.train import refuse, refuse_too_few
from training.systems.system import TrainConfig


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_workers": 2, "accumulate": 4},
            "vae.accumulate=4 does not divide a worker's 6 samples of vae.batch_size=12: change either",
        ),
        ({"accumulate": 5}, "vae.accumulate=5 does not divide a worker's 12 samples of vae.batch_size=12"),
        (
            {"num_workers": 12, "accumulate": 2},
            "vae.accumulate=2 does not divide a worker's 1 samples of vae.batch_size=12",
        ),
        (
            {"num_workers": 5},
            "vae.batch_size=12 is not a multiple of vae.num_workers=5: change either, for example vae.num_workers=4",
        ),
        ({"num_workers": 24}, "vae.batch_size=12 is not a multiple of vae.num_workers=24"),
        ({"num_workers": 1, "fsdp": True}, "vae.fsdp shards weights over workers and needs vae.num_workers"),
    ],
)
def test_workers_and_parts_that_do_not_divide_the_batch_are_refused(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        refuse("vae", TrainConfig(batch_size=12, **settings))


@pytest.mark.parametrize("settings", [{}, {"num_workers": 3, "accumulate": 2}, {"accumulate": 12}])
def test_what_divides_it_is_not(settings: dict[str, Any]) -> None:
    refuse("vae", TrainConfig(batch_size=12, **settings))


def test_held_out_samples_fill_no_batch() -> None:
    config = TrainConfig(batch_size=19, validate_every=5)
    refuse_too_few("vae", config, 22)
    with pytest.raises(UserError, match=r"^vae.batch_size=19, but there are only 18 samples to train on"):
        refuse_too_few("vae", config, 20)
