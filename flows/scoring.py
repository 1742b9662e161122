"""`darkroom score`: two sets of pictures, or one and published statistics -> every metric with its interval and protocol."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data import storage
from data.errors import UserError
from training.metrics import references
from training.metrics.catalogue import METRICS, Sample, few
from training.metrics.extraction import extract, extract_arrays, picture_files
from training.metrics.extractors import HUB, WEIGHTS, Extractor, load, parse, weights_of
from training.metrics.frechet import Gaussian
from training.metrics.protocol import Protocol

Report = Callable[[str, int, int], None]
"""(which side, pictures done, pictures in all)"""


@dataclass(frozen=True, eq=False)
class Side:
    """One set of pictures, as far as it is known."""

    digest: str
    """SHA-256 over the pictures' bytes in order, which statistics of ours tell too; of another statistics file, that of the file."""
    n: int | None
    features: dict[str, np.ndarray]
    """extractor -> (N, D)"""
    gaussians: dict[str, Gaussian]
    sizes: frozenset[tuple[int, int]] = frozenset()
    prompts: str = ""
    """SHA-256 of the captions in order, where every picture has one."""


def score(
    real: str,
    fake: str,
    wanted: Sequence[str],
    specs: Sequence[str],
    report: Report,
    *,
    save_real: str | None = None,
    features: str | None = None,
    images_per_prompt: int = 1,
) -> dict[str, Any]:
    """{"real", "fake", "scores": [{name, value, low, high, n, better, meaning, protocol, deletions}], "warnings": [sentence]}.

    `wanted` metrics, or all that the extractors allow; `specs` as `--extractor` has them. `features`: a folder that keeps what
    was extracted, for a call that goes on after a stop or asks for other metrics. `images_per_prompt`: pictures of `fake` that
    follow each other and share a prompt. Raises UserError for what the user has to mend: folders without pictures, missing
    weights, statistics of another extractor, features that are not finite.
    """
    given = parse(specs)
    if features and "://" in features:
        raise UserError(
            f"--features {features} is no folder of this machine, from which features are mapped into memory"
        )
    _require_place(save_real)
    files = picture_files(_folder(fake, "--fake"))
    if images_per_prompt < 1 or len(files) % images_per_prompt:
        raise UserError(
            f"--images-per-prompt {images_per_prompt}: {fake} has {len(files)} pictures, which are no whole number of prompts"
        )
    captions = _captions(files)
    if captions:
        _require_shared(captions, files, images_per_prompt)
    names = _chosen(wanted, given, has_captions=captions is not None)
    extractors = _loaded(names, given)
    if save_real and len(extractors) != 1:
        raise UserError("--save-real keeps the features of one extractor: choose metrics of a single one")
    warnings = [] if captions or wanted or "clip" not in given else _lacking_captions(fake, files)
    if images_per_prompt == len(files):
        warnings.append(
            f"--images-per-prompt {images_per_prompt}: all pictures of {fake} share one prompt, so the intervals tell the spread "
            "within it and not what other prompts would give"
        )
    with tempfile.TemporaryDirectory(prefix="darkroom-score-") as scratch:
        place = Path(features or scratch)
        reference = _reference(real, extractors, place, report)
        if save_real and extractors[0].name not in reference.features:
            raise UserError(
                f"--save-real: {real} has a mean and a covariance alone, which are saved already: give the folder of pictures"
            )
        names = _possible(names, reference, real, bool(wanted), warnings)
        digest = _digest(files)
        seen = extract(files, extractors, _kept(place, digest), lambda *n: report("fake", *n))
        prompts = hashlib.sha256("\n".join(captions).encode()).hexdigest() if captions else ""
        generated = Side(digest, len(files), seen.features, {}, seen.sizes, prompts)
        for where, side in ((real, reference), (fake, generated)):
            warnings += _mixed_sizes(where, side)
        if save_real:
            only = extractors[0]
            references.write_reference(save_real, only, reference.features[only.name], reference.digest)
        scores = []
        for extractor in extractors:
            mine = [name for name in names if METRICS[name].extractor == extractor.name]
            texts = extractor.text(captions) if captions and extractor.text else None
            sample = _sample(extractor, reference, generated, texts, images_per_prompt)
            warnings += filter(None, [few(sample, extractor.name)])
            scores += [_score(name, sample, extractor, reference, generated) for name in mine]
    return {"real": real, "fake": fake, "scores": scores, "warnings": list(dict.fromkeys(warnings))}


def _chosen(wanted: Sequence[str], given: dict[str, tuple[str, bool]], *, has_captions: bool) -> list[str]:
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise UserError(
            f"--metrics {', '.join(unknown)}: there is no such metric; there are {', '.join(METRICS)}"
        )
    if wanted:
        missing = {_weights_of(name) for name in wanted} - set(given)
        if missing:
            lacking = "; ".join(f"--extractor {name}=PATH, {WEIGHTS[name]}" for name in sorted(missing))
            raise UserError(
                f"--metrics {','.join(wanted)}: weights are missing, and none are downloaded unasked: {lacking}"
            )
        if not has_captions and (texts := [n for n in wanted if METRICS[n].needs == "text"]):
            raise UserError(
                f"--metrics {', '.join(texts)}: needs a caption NAME.txt beside every picture of --fake"
            )
        return list(dict.fromkeys(wanted))
    if not given:
        lines = [
            f"--extractor {name}=PATH ({what}) or {name}={HUB[name]} (a download) gives {_names_of(name)}"
            for name, what in WEIGHTS.items()
        ]
        raise UserError(
            "nothing to look at the pictures with, and no weights are downloaded unasked:\n  "
            + "\n  ".join(lines)
        )
    allowed = [name for name, metric in METRICS.items() if metric.by_default and _weights_of(name) in given]
    return [name for name in allowed if has_captions or METRICS[name].needs != "text"]


def _weights_of(metric: str) -> str:
    return weights_of(METRICS[metric].extractor)


def _names_of(weights: str) -> str:
    return ", ".join(name for name in METRICS if _weights_of(name) == weights)


def _loaded(names: Sequence[str], given: dict[str, tuple[str, bool]]) -> list[Extractor]:
    needed = dict.fromkeys(METRICS[name].extractor for name in names)
    places = {name: given[weights_of(name)] for name in needed}
    return [load(name, path, is_custom=is_custom) for name, (path, is_custom) in places.items()]


def _kept(place: Path, digest: str) -> Path:
    """The folder in `place` of the features of pictures with that digest."""
    folder = place / digest[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--features {place} cannot be written ({error}): give another folder") from error
    return folder


def _reference(real: str, extractors: Sequence[Extractor], place: Path, report: Report) -> Side:
    if real and Path(real).is_dir():
        files = picture_files(real)
        digest = _digest(files)
        seen = extract(files, extractors, _kept(place, digest), lambda *n: report("real", *n))
        return Side(digest, len(files), seen.features, {}, seen.sizes)
    if not real or not Path(real).is_file():
        raise UserError(
            f"--real {real or '(nothing)'} does not exist: give a folder of pictures or a statistics file (.npz)"
        )
    side = Side(storage.sha256(real)[1], None, {}, {})
    for extractor in extractors:
        found = references.read_reference(real, extractor.name)
        if found.images is not None:
            folder = _kept(place, side.digest)
            seen = extract_arrays(found.images, extractors, folder, lambda *n: report("real", *n))
            return replace(side, n=len(found.images), features=seen.features)
        references.require_match(found, name=extractor.name, digest=extractor.digest, resize=extractor.resize)
        side = replace(side, digest=found.source or side.digest)
        if found.features is not None:
            side.features[extractor.name] = found.features
        if found.gaussian is not None:
            side.gaussians[extractor.name] = found.gaussian
            side = replace(side, n=found.gaussian.n)
    return side


def _sample(
    extractor: Extractor, reference: Side, generated: Side, text: np.ndarray | None, group: int
) -> Sample:
    name = extractor.name
    real, fake = reference.features.get(name), generated.features[name]
    gaussian = reference.gaussians.get(name)
    if gaussian is None and real is not None:
        gaussian = Gaussian.fitted(real)
    if gaussian is not None and len(gaussian.mean) != fake.shape[1]:
        raise UserError(
            f"the statistics of --real have width {len(gaussian.mean)}, and {name} gives {fake.shape[1]}: "
            "they are of another extractor"
        )
    return Sample(fake, gaussian, real, text, extractor.head, group=group)


def _possible(
    names: list[str], reference: Side, real: str, is_wanted: bool, warnings: list[str]
) -> list[str]:
    """Without the metrics that need features of single real pictures, where a file has moments alone."""
    lost = [n for n in names if METRICS[n].needs == "real" and METRICS[n].extractor not in reference.features]
    if lost and is_wanted:
        raise UserError(
            f"--metrics {', '.join(lost)}: {real} has a mean and a covariance and no features of single pictures: "
            "give the folder of pictures"
        )
    if lost:
        warnings.append(f"{real} has no features of single pictures, so there is no {', '.join(lost)}")
    return [name for name in names if name not in lost]


def _score(
    name: str, sample: Sample, extractor: Extractor, reference: Side, generated: Side
) -> dict[str, Any]:
    metric = METRICS[name]
    try:
        found = metric.compute(sample)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    uses_reference = metric.needs in ("reference", "real")
    protocol = Protocol(
        metric=name,
        settings=metric.settings,
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        resize=extractor.resize,
        n=len(sample.fake),
        prompts=generated.prompts,
        images_per_prompt=sample.group,
        reference=reference.digest if uses_reference else "",
        reference_n=(reference.n or 0) if uses_reference else 0,
        weights={"images": generated.digest},
    )
    return {
        "name": name,
        "value": found.value,
        "low": found.interval[0],
        "high": found.interval[1],
        "n": len(sample.fake),
        "better": metric.better,
        "meaning": f"{metric.meaning}; {found.note}" if found.note else metric.meaning,
        "facts": dict(found.facts),
        "protocol": protocol.model_dump(mode="json") | {"digest": protocol.digest},
        "deletions": found.deletions.model_dump() if found.deletions else None,
    }


def _mixed_sizes(where: str, side: Side) -> list[str]:
    if len(side.sizes) < 2:
        return []
    (w, h), (wide, high) = min(side.sizes), max(side.sizes)
    return [
        f"{where} has pictures of {len(side.sizes)} sizes, {w}x{h} to {wide}x{high}: each is resized alone, which is right "
        "only if the other side was made in the same way"
    ]


def _captions(files: Sequence[Path]) -> list[str] | None:
    """The captions beside the pictures, or None where one is missing."""
    texts = [file.with_suffix(".txt") for file in files]
    if not all(text.is_file() for text in texts):
        return None
    return [text.read_text("utf-8", "replace").strip() for text in texts]


def _lacking_captions(fake: str, files: Sequence[Path]) -> list[str]:
    """The sentence for a folder where some pictures have captions, so that the others were forgotten or lost."""
    lacking = [file for file in files if not file.with_suffix(".txt").is_file()]
    if len(lacking) == len(files):
        return []
    return [
        f"{len(lacking)} of {len(files)} pictures of {fake} have no caption beside them, {lacking[0].name} for one, so there is no "
        "clip_score"
    ]


def _require_shared(captions: Sequence[str], files: Sequence[Path], images_per_prompt: int) -> None:
    for at, caption in enumerate(captions):
        first = at - at % images_per_prompt
        if caption != captions[first]:
            raise UserError(
                f"--images-per-prompt {images_per_prompt}: {files[first]} and {files[at]} should share a prompt, and their captions "
                "differ: name the pictures of a prompt so that they follow each other, or give another number"
            )


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(storage.sha256(str(file))[1]))
    return digest.hexdigest()


def _require_place(save_real: str | None) -> None:
    """Raises UserError when `--save-real` cannot be written, before all pictures have been looked at."""
    if save_real and not (folder := references.written_at(save_real).parent).is_dir():
        raise UserError(f"--save-real {save_real}: there is no folder {folder}; make it, or give another one")


def _folder(path: str, option: str) -> str:
    if not path or not Path(path).is_dir():
        what = "is a file" if path and Path(path).exists() else "does not exist"
        raise UserError(f"{option} {path or '(nothing)'} {what}: give a folder of pictures")
    return path
