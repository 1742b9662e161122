"""The language of `--set PATH=VALUE`: every path that a recipe has, values typed by its fields, and what to say of wrong ones."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from data.errors import UnknownPath, UserError
from flows.protocols import PROTOCOLS
from flows.recipes import Recipe


def edited(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """`recipe` with every `PATH=VALUE` applied, typed by its own fields; raises UserError saying what would be valid.

    The settings are checked together, so that two which only make sense as a pair may come in any order.
    """
    known = {path: field for path, field in paths().items() if path not in ("name", "summary")}
    document = recipe.model_dump(mode="json")
    assignments = [*assignments]
    given: dict[str, str] = {}
    for assignment in assignments:
        path, text = _parsed(assignment)
        if path == "evaluate.protocol" and text in PROTOCOLS:
            document["evaluate"] |= PROTOCOLS[text].fixes
    for assignment in assignments:
        path, text = _parsed(assignment)
        if path not in known:
            raise _unknown(path, known)
        *sections, leaf = path.split(".")
        target = document
        for section in sections:
            target = target[section]
        target[leaf] = _value(text, known[path].annotation)
        given[path] = text
    try:
        return Recipe.model_validate(document) if given else recipe
    except ValidationError as error:
        raise _refusal(error, given, known) from error


def paths(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every path that `--set` accepts, with its field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= paths(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def _parsed(assignment: str) -> tuple[str, str]:
    path, separator, text = (part.strip() for part in assignment.partition("="))
    if not separator:
        raise UserError(f"--set {assignment!r} has no '=': write PATH=VALUE, such as denoiser.max_steps=500")
    if not text:
        raise UserError(f"--set {path}= has no value: write PATH=VALUE, with null for none")
    return path, text


def _unknown(path: str, known: Mapping[str, Any]) -> UnknownPath:
    section = path.split(".")[0] + "."
    near = difflib.get_close_matches(path, known, 3, cutoff=0.5) or [
        p for p in known if p.startswith(section)
    ]
    hint = f"did you mean {' or '.join(near[:3])}?"
    if not near:
        hint = f"its sections are {', '.join(sorted({p.split('.')[0] for p in known if '.' in p}))}"
    return UnknownPath(f"--set {path}: the recipe has no such path; {hint}")


def _value(text: str, annotation: Any) -> Any:
    """What `text` stands for: null, JSON, numbers with commas between them as a list, or itself."""
    if text.lower() in ("none", "null"):
        return None
    if str in (annotation, *get_args(annotation)):
        return text
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(f"[{text.strip('()').rstrip(',')}]") if "," in text else text
    except ValueError:
        return text


def _refusal(error: ValidationError, given: Mapping[str, str], known: Mapping[str, Any]) -> UserError:
    """The sentence of the first problem, by the setting that it is about; a check of a whole section names all of its settings."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    about = [path for path in given if f"{place}.".startswith(f"{path}.")]
    exact = bool(about)
    about = about or [path for path in given if path.startswith(place)] or list(given)
    settings = " ".join(f"--set {path}={given[path]}" for path in about)
    message = first["msg"].removeprefix("Value error, ")
    sentence = message[0].lower() + message[1:]
    if first["type"] in ("tuple_type", "list_type"):
        sentence += ", such as 64,128"
    meaning = known[about[0]].description if exact else None
    return UserError(f"{settings}: {sentence}{f' ({meaning})' if meaning else ''}")
