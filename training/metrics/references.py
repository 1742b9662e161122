"""Statistics of real pictures in files: read in the formats that other tools publish, written in one that they read.

    .npz  mu, sigma               pytorch-fid, clean-fid, EDM; also ours, with n, feats and a JSON file beside it
    .npz  mu, sigma, mu_s …       guided-diffusion (ADM): the spatial statistics are left aside
    .npz  arr_0                   guided-diffusion (ADM): pictures, uint8 (N, H, W, 3)
    .npz  feats                   clean-fid's KID
    .pkl  {metric: {mu, sigma}}   EDM2, through an unpickler that can build arrays of numbers and nothing else

Legend: N pictures, D feature width.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import storage
from data.errors import UserError
from training.metrics import extractors, inception
from training.metrics.extractors import Extractor
from training.metrics.frechet import Gaussian

_NO_ARRAYS = (
    OSError,
    ValueError,
    EOFError,
    AttributeError,
    RuntimeError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise of archives that are torn, locked, packed in unknown ways, or none."""
PICKLED = {"fid": "inception", "fd_dinov2": "dinov2"}
"""EDM2's names of what it keeps statistics for."""
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


@dataclass(frozen=True, eq=False)
class Reference:
    """What a file tells of real pictures; `extractor` "" where it does not say whose statistics they are."""

    path: Path
    extractor: str = ""
    digest: str = ""
    """SHA-256 of the extractor's weights, where the file's JSON tells."""
    resize: str = ""
    gaussian: Gaussian | None = None
    features: np.ndarray | None = None
    """(N, D) float"""
    images: np.ndarray | None = None
    """(N, H, W, 3) uint8"""
    source: str = ""
    """Content digest of the pictures, where the file's JSON tells it of this very file."""


def read_reference(path: str | Path, extractor: str) -> Reference:
    """What the file at `path` holds for `extractor` (inception, clip …). Raises UserError when it is nothing of the kind."""
    path = Path(path)
    if path.suffix in (".pkl", ".pickle"):
        return _from_pickle(path, extractor)
    arrays, told = _arrays(path), _told(path)
    if "arr_0" in arrays and "mu" not in arrays:
        images = arrays["arr_0"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
            raise UserError(
                f"{path}: arr_0 is {images.dtype} {images.shape}, not pictures: uint8 (N, H, W, 3)"
            )
        if len(images) < 2:
            raise UserError(f"{path} has {len(images)} pictures: a distribution needs many, and two at least")
        return Reference(path, images=images)
    features = arrays.get("feats")
    if features is not None:
        _require_features(path, features)
    if "mu" in arrays and "sigma" in arrays:
        gaussian = _gaussian(path, arrays["mu"], arrays["sigma"], _count(path, arrays))
    elif features is not None:
        gaussian = Gaussian.fitted(features)
    else:
        raise UserError(
            f"{path} has no mu and sigma, no feats and no arr_0 but {', '.join(arrays)}: give another file"
        )
    facts = {name: str(told.get(name, "")) for name in ("extractor", "digest", "resize")}
    if "sha256" in told:
        if told["sha256"] != storage.sha256(str(path))[1]:
            raise UserError(
                f"{path.with_suffix('.json')} tells of another file than {path}: copy both again, or remove the first"
            )
        facts["source"] = str(told.get("reference", ""))
    return Reference(path, gaussian=gaussian, features=features, **facts)


def require_match(reference: Reference, *, name: str, digest: str, resize: str) -> None:
    """Raises UserError when the file says that its statistics are of another extractor, resize rule or weights; what is
    empty is not asked for."""
    for told, mine in {"extractor": name, "digest": digest, "resize": resize}.items():
        theirs = getattr(reference, told)
        if mine and theirs and theirs != mine:
            raise UserError(
                f"{reference.path} holds statistics of {told} {theirs[:60]} and the generated pictures would be looked at by "
                f"{mine[:60]}: give the same extractor for both"
            )


def inception_statistics(path: str, weights: str | None = None) -> Gaussian:
    """Statistics of real images' Inception features from a file.

    Raises UserError when the file is missing, holds no such statistics, or was made by an extractor of another width; where
    it tells by what, also by another resize rule, or by other weights than those in the file `weights`.
    """
    found = read_reference(path, "inception")
    is_here = weights and weights != "hub"  # planning downloads nothing
    digest = extractors.digest_of("inception", weights) if is_here and found.digest else ""
    require_match(found, name="inception", digest=digest, resize=extractors.RESIZE["inception"])
    gaussian = found.gaussian
    if gaussian is None:
        raise UserError(f"evaluate.reference={path} holds pictures: give statistics of Inception features")
    if len(gaussian.mean) != inception.WIDTH:
        raise UserError(
            f"evaluate.reference={path} has features of width {len(gaussian.mean)}, and Inception's are {inception.WIDTH}: it "
            "is of another extractor"
        )
    return gaussian


def write_reference(path: str | Path, extractor: Extractor, features: np.ndarray, source: str) -> Path:
    """Writes `features` (N, D) of real pictures as mu, sigma, n and feats, and beside it a JSON file that says by what and of
    what (`source`: their content digest). Returns the path, which ends in .npz. Raises UserError when it cannot be written."""
    path = written_at(path)
    gaussian = Gaussian.fitted(features)
    facts = {"extractor": extractor.name, "digest": extractor.digest, "resize": extractor.resize}
    facts |= {"n": len(features), "reference": source}
    try:
        np.savez(path, mu=gaussian.mean, sigma=gaussian.covariance, n=len(features), feats=features)
        facts["sha256"] = storage.sha256(str(path))[1]
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({(error.strerror or str(error)).lower()})") from error
    return path


def written_at(path: str | Path) -> Path:
    """Where `write_reference` writes what it is told to write to `path`: a name that ends in .npz."""
    path = Path(path)
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is a single array: give an .npz file with mu and sigma")
        with file:
            return {name: _array(file, name) for name in file.files}
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give a folder of pictures or an .npz file") from error
    except MemoryError as error:
        raise UserError(
            f"{path} announces arrays that do not fit into memory: give statistics, or the pictures as files"
        ) from error
    except _NO_ARRAYS as error:
        raise UserError(
            f"{path} is no .npz file of plain arrays: give one, or a folder of pictures"
        ) from error


def _array(file: Any, name: str) -> np.ndarray:
    array = file[name]
    if not isinstance(array, np.ndarray):  # numpy hands out the bytes of what has no header of an array
        raise ValueError(f"{name} is no array")
    return array


def _told(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        told = json.loads(beside.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{beside} is not JSON: copy it again, or remove it") from error
    return told if isinstance(told, dict) else {}


def _require_features(path: Path, features: np.ndarray) -> None:
    is_matrix = features.ndim == 2 and features.dtype.kind == "f" and features.shape[1] > 0
    if not is_matrix or not np.isfinite(features).all():
        raise UserError(f"{path}: its feats are no matrix (N, D) of finite floats: make the file again")
    if len(features) < 2:
        raise UserError(
            f"{path} has features of {len(features)} pictures: a distribution needs many, and two at least"
        )


def _count(path: Path, arrays: dict[str, np.ndarray]) -> int | None:
    """The number of pictures behind the statistics, where the file tells."""
    if "n" not in arrays:
        return None
    n = arrays["n"]
    if n.ndim or n.dtype.kind not in "iuf" or not np.isfinite(n) or n < 2:
        raise UserError(f"{path}: its n is no number of pictures, two at least: make the file again")
    return int(n)


def _gaussian(path: Path, mu: np.ndarray, sigma: np.ndarray, n: int | None) -> Gaussian:
    is_plain = mu.dtype.kind == sigma.dtype.kind == "f" and mu.ndim == 1
    if (
        not is_plain
        or sigma.shape != (len(mu), len(mu))
        or not (np.isfinite(mu).all() and np.isfinite(sigma).all())
    ):
        raise UserError(
            f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean (D,) and covariance (D, D) of finite numbers"
        )
    if (np.diag(sigma) < 0).any():
        raise UserError(f"{path}: sigma has negative variances and is no covariance: make the file again")
    covariance = sigma.astype(np.float64)
    return Gaussian(mu.astype(np.float64), (covariance + covariance.T) / 2, n)


def _from_pickle(path: Path, extractor: str) -> Reference:
    wanted = next((name for name, ours in PICKLED.items() if ours == extractor), None)
    try:
        content = _NumbersOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give a folder of pictures or a statistics file") from error
    except Exception as error:  # damaged pickles raise anything
        raise UserError(f"{path} is no pickle of plain arrays ({error}): give an .npz file") from error
    entry = content.get(wanted) if isinstance(content, dict) and wanted else None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), np.ndarray) for k in ("mu", "sigma")):
        has = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has no statistics for {extractor}; it has {has}")
    return Reference(path, extractor, gaussian=_gaussian(path, entry["mu"], entry["sigma"], None))


class _NumbersOnly(pickle.Unpickler):
    """Builds dicts, strings, numbers and arrays of numbers; any other name in the file ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
