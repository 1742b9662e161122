"""Two values compare only under one protocol; what a comparison is about may differ, and nothing else."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from training.metrics.protocol import Protocol, differences

FD = Protocol(
    metric="fd_clip",
    extractor="clip",
    extractor_digest="ab" * 32,
    resize="bicubic",
    n=600,
    reference="cd" * 32,
    reference_n=5000,
    prompts="ef" * 32,
    seeds=(0,),
    sampler="dpm_solver",
    num_inference_steps=15,
    guidance_scale=2.0,
    sampling={"noise_level": 100},
    weights={"denoiser": "01" * 32},
    ema=True,
)


def test_other_weights_are_what_a_comparison_is_about():
    other = FD.model_copy(update={"weights": {"denoiser": "23" * 32, "prior": "45" * 32}})
    assert differences(FD, other) == []
    assert FD.digest == other.digest and len(FD.digest) == 12


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"extractor_digest": "99" * 32}, "extractor_digest abababababab and 999999999999"),
        ({"resize": "clean"}, "resize bicubic and clean"),
        ({"n": 5000}, "n 600 and 5000"),
        ({"reference": ""}, "reference cdcdcdcdcdcd and none"),
        ({"prompts": "00" * 32}, "prompts efefefefefef and 000000000000"),
        ({"seeds": (0, 1)}, "seeds [0] and [0, 1]"),
        ({"sampler": "ddim"}, "sampler dpm_solver and ddim"),
        ({"num_inference_steps": 20}, "num_inference_steps 15 and 20"),
        ({"guidance_scale": 3.0}, "guidance_scale 2.0 and 3.0"),
        ({"sampling": {"noise_level": 0}}, "sampling.noise_level 100 and 0"),
        ({"settings": {"k": 3}}, "settings.k none and 3"),
        ({"ema": False}, "ema True and False"),
    ],
)
def test_any_other_field_is_another_protocol_and_is_named(change, sentence):
    other = FD.model_copy(update=change)
    assert differences(FD, other) == [sentence]
    assert FD.digest != other.digest


def test_what_is_under_comparison_can_be_named():
    other = FD.model_copy(update={"guidance_scale": 3.0, "weights": {}})
    assert differences(FD, other, ignoring={"guidance_scale", "weights"}) == []
    assert differences(FD, other, ignoring={"guidance_scale"}) == ["weights.denoiser 010101010101 and none"]
    with pytest.raises(ValueError, match="a protocol has no guidance; it has metric, settings"):
        differences(FD, other, ignoring={"guidance"})


def test_a_protocol_is_frozen_closed_and_the_same_after_json():
    assert Protocol.model_validate_json(FD.model_dump_json()) == FD
    with pytest.raises(ValidationError):
        Protocol.model_validate({"metric": "fid", "n": 2, "note": "x"})
    with pytest.raises(ValidationError):
        FD.n = 3
