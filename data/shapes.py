"""The built-in *shapes*: 32 px scenes whose captions state all that there is to see.

Every scene is one shape on a plain background: colour (8) x shape (4) x size (2) x background (4) x position (5).
Some (colour, shape) pairs are held out of the training data, so that prompts can ask for combinations never seen.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 32
SUPERSAMPLING = 4

COLOURS = {
    "red": (220, 25, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 235, 50),
    "green": (20, 150, 50),
    "cyan": (0, 215, 225),
    "blue": (25, 60, 225),
    "purple": (140, 25, 170),
    "pink": (255, 130, 205),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "brown": (100, 60, 25)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 5.3, "large": 7.2}
"""Radius of the circle in pixels; the square encloses it, triangle and star reach beyond it."""
POSITIONS = {
    "left": (-4.8, 0.0),
    "right": (4.8, 0.0),
    "top": (0.0, -4.8),
    "bottom": (0.0, 4.8),
    "centre": (0.0, 0.0),
}
"""Offset of the centroid from the centre of the picture in pixels, x to the right, y down."""
HELDOUT_PAIRS = frozenset({("purple", "star"), ("orange", "square"), ("green", "triangle")})

POSITION_JITTER = 0.25
SCALE_JITTER = 0.02
"""Pixels and share: enough that no two pictures of a scene need be alike, little enough to be learned in minutes."""

_PREPOSITIONS = {"left": "on", "right": "on", "top": "at", "bottom": "at", "centre": "in"}
_PHRASINGS = (
    "a {size} {colour} {shape} {place} of a {background} background",
    "on a {background} background, a {size} {colour} {shape} {place}",
    "a {background} background with a {size} {colour} {shape} {place}",
    "{place}, a {size} {colour} {shape} on {background}",
    "{size} {colour} {shape} {place}, {background} background",
    "a {size} {shape} in {colour} {place} of a {background} picture",
    "a picture of a {size} {colour} {shape} {place} against {background}",
    "there is a {size} {colour} {shape} {place} and the background is {background}",
)


@dataclass(frozen=True)
class Scene:
    """One combination of attributes. What `recognise` cannot see it calls "none"."""

    colour: str
    shape: str
    size: str
    background: str
    position: str


SCENES = tuple(itertools.starmap(Scene, itertools.product(COLOURS, SHAPES, SIZES, BACKGROUNDS, POSITIONS)))


def is_heldout(scene: Scene) -> bool:
    """Whether `scene` never appears in training data (120 of the 1280)."""
    return (scene.colour, scene.shape) in HELDOUT_PAIRS


def render(scene: Scene, rng: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """(32, 32, 3) uint8 RGB picture of `scene`; `rng` moves and scales the shape a little, None draws it true."""
    dx, dy, growth = (0.0, 0.0, 0.0) if rng is None else rng.uniform(-1, 1, 3)
    radius = SIZES[scene.size] * (1 + SCALE_JITTER * growth)
    x, y = (SIDE / 2 + offset for offset in POSITIONS[scene.position])
    centre = (x + POSITION_JITTER * dx, y + POSITION_JITTER * dy)
    canvas = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), BACKGROUNDS[scene.background])
    outline = [
        tuple(SUPERSAMPLING * c - 0.5 for c in point) for point in _outline(scene.shape, centre, radius)
    ]
    ImageDraw.Draw(canvas).polygon(outline, fill=COLOURS[scene.colour])
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrasing of `scene`, drawn by `rng`; every phrasing states all five attributes."""
    return phrasings(scene)[rng.integers(len(_PHRASINGS))]


def phrasings(scene: Scene) -> list[str]:
    """Every caption that `scene` can have, always in the same order."""
    place = f"{_PREPOSITIONS[scene.position]} the {scene.position}"
    return [phrasing.format(**asdict(scene), place=place) for phrasing in _PHRASINGS]


def write_folder(folder: Path, *, count: int, seed: int) -> None:
    """Writes `count` captioned pictures of seen scenes and every evaluation prompt, once: an existing folder stays.

    `images/{i:06d}.png`, `metadata.jsonl` ({"file_name", "text"}) and `prompts.jsonl` ({"text", "heldout", "truth"}).
    Picture i depends on `seed` and i alone. Raises ValueError for a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; a dataset has at least 1 picture")
    publish_folder(folder, itertools.islice(_pictures(seed), count), _prompts(seed))


def publish_folder(
    folder: Path, pictures: Iterable[tuple[NDArray[np.uint8], str]], prompts: Iterable[dict[str, Any]]
) -> None:
    """Writes (image, caption) pairs and prompts as an image folder in one step; does nothing where `folder` exists."""
    if folder.exists():
        return
    draft = folder.with_name(f".tmp-{secrets.token_hex(6)}-{folder.name}")
    try:
        (draft / "images").mkdir(parents=True)
        _write_lines(draft / "metadata.jsonl", _save_pictures(draft, pictures))
        _write_lines(draft / "prompts.jsonl", prompts)
        _move_unless_there(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_pictures(
    folder: Path, pictures: Iterable[tuple[NDArray[np.uint8], str]]
) -> Iterator[dict[str, str]]:
    for i, (image, text) in enumerate(pictures):
        name = f"images/{i:06d}.png"
        Image.fromarray(image).save(folder / name, compress_level=1)
        yield {"file_name": name, "text": text}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _move_unless_there(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process that published the same folder first is no failure
            raise


def _pictures(seed: int) -> Iterator[tuple[NDArray[np.uint8], str]]:
    seen = [scene for scene in SCENES if not is_heldout(scene)]
    order = np.random.default_rng((seed, 0)).permutation(len(seen))
    for i in itertools.count():
        rng = np.random.default_rng((seed, 1, i))
        scene = seen[order[i % len(seen)]]
        yield render(scene, rng), caption(scene, rng)


def _prompts(seed: int) -> Iterator[dict[str, Any]]:
    """Every seen scene once, and after each third one a held-out scene, so that any prefix asks for both."""
    rng = np.random.default_rng((seed, 2))
    turns = {scene: rng.permutation(len(_PHRASINGS)) for scene in SCENES}
    seen, heldout = (_shuffled([s for s in SCENES if is_heldout(s) == held], rng) for held in (False, True))
    for i, scene in enumerate(seen):
        yield _prompt(scene, turns[scene][0])
        if i % 3 == 2:
            round_, place = divmod(i // 3, len(heldout))
            yield _prompt(heldout[place], turns[heldout[place]][round_])


def _prompt(scene: Scene, phrasing: int) -> dict[str, Any]:
    truth = {"kind": "shapes", **asdict(scene)}
    return {"text": phrasings(scene)[phrasing], "heldout": is_heldout(scene), "truth": truth}


def _shuffled(scenes: list[Scene], rng: np.random.Generator) -> list[Scene]:
    return [scenes[i] for i in rng.permutation(len(scenes))]


def _outline(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Corners of `shape` with its centroid at `centre`: the first straight up, the others clockwise."""
    match shape:
        case "circle":
            reach = [radius] * 64
        case "triangle":
            reach = [1.35 * radius] * 3
        case "star":
            reach = [1.3 * radius, 0.5 * radius] * 5
        case _:
            reach = [0.0, math.sqrt(2) * radius] * 4
    turns = [2 * math.pi * i / len(reach) for i in range(len(reach))]
    corners = zip(turns, reach, strict=True)
    return [(centre[0] + r * math.sin(a), centre[1] - r * math.cos(a)) for a, r in corners if r > 0]
