"""What a metric's value depends on besides the model that it judges: two values compare only under one protocol."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import Field

from data.config import Config, fingerprint

SUBJECT = frozenset({"weights"})
"""What a comparison is about: these fields differ between the compared, all others must not."""


class Protocol(Config):
    """How one value was made. Fields that a metric does not use keep their defaults."""

    metric: str = Field(description="the metric's name")
    settings: dict[str, Any] = Field({}, description="the metric's own constants: k, subset size, estimator")
    extractor: str = Field("", description="what looks at a picture: clip, inception, dinov2, shape_judge …")
    extractor_digest: str = Field("", description="content digest of its weights")
    resize: str = Field("", description="how pictures reach the extractor's size: tf1, clean, bicubic …")
    n: int = Field(description="pictures, or pairs, that the value was computed from")
    reference: str = Field("", description="content digest of the set of real pictures")
    reference_n: int = Field(0, description="its pictures")
    prompts: str = Field("", description="SHA-256 of the prompt manifest")
    images_per_prompt: int = Field(1, description="pictures drawn per prompt, each from its own noise")
    seeds: tuple[int, ...] = Field((), description="of generation; noise follows (seed, prompt, picture)")
    sampler: str = Field("", description="what integrates the denoiser: dpm_solver, ddim …")
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampling: dict[str, Any] = Field({}, description="every other setting of the sampler")
    weights: dict[str, str] = Field(
        {},
        description='role -> content digest of what drew the pictures, or {"images": digest} of pictures of unknown making',
    )
    ema: bool | None = Field(None, description="whether averaged weights drew the pictures")

    @property
    def digest(self) -> str:
        """12 hex digits: equal for values that may share a column."""
        return fingerprint(self.model_dump(mode="json", exclude=set(SUBJECT)))

    @property
    def sentence(self) -> str:
        """The protocol in one line, for a page."""
        looked = f"{self.extractor} {self.extractor_digest[:8]}".strip() + (
            f", resize {self.resize}" if self.resize else ""
        )
        against = f"against {self.reference_n:,} real images {self.reference[:8]}" if self.reference else ""
        drawn = [
            f"prompts {self.prompts[:8]}" if self.prompts else "",
            f"{self.images_per_prompt} images each" if self.images_per_prompt > 1 else "",
            f"seed {', '.join(map(str, self.seeds))}" if self.seeds else "",
            self.sampler + (f" in {self.num_inference_steps} steps" if self.num_inference_steps else ""),
            f"guidance {self.guidance_scale:g}" if self.guidance_scale is not None else "",
            "averaged weights" if self.ema else "",
        ]
        return ", ".join(part for part in (looked, against, *drawn, f"protocol {self.digest[:8]}") if part)


def differences(a: Protocol, b: Protocol, *, ignoring: Collection[str] = SUBJECT) -> list[str]:
    """Where two protocols differ, such as `guidance_scale 2.0 and 3.0`; empty where their values compare.

    `settings` and `sampling` are compared key by key (`sampling.noise_level`). `ignoring` names what is under comparison;
    raises ValueError when a name is none of a protocol's.
    """
    first, second = _flat(a), _flat(b)
    places = sorted({*first, *second}, key=_order)
    unknown = {name for name in ignoring if name not in Protocol.model_fields and name not in places}
    if unknown:
        raise ValueError(
            f"a protocol has no {', '.join(sorted(unknown))}; it has {', '.join(Protocol.model_fields)}"
        )
    return [
        f"{place} {_shown(first.get(place))} and {_shown(second.get(place))}"
        for place in places
        if first.get(place) != second.get(place) and not {place, place.split(".")[0]} & set(ignoring)
    ]


def _flat(protocol: Protocol) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in protocol.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat


def _order(place: str) -> tuple[int, str]:
    return list(Protocol.model_fields).index(place.split(".")[0]), place


def _shown(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return value[:12] if is_digest else "none" if value in (None, "", [], {}) else str(value)
