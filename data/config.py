"""Frozen configs, their canonical JSON, and the fingerprint that names a computation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A frozen, closed record: unknown fields are refused, nothing changes after construction."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        hide_input_in_errors=True,  # what was given may hold credentials, and an error is logged
    )


def operational(default: Any, **constraints: Any) -> Any:
    """A field that says how to run and never what comes out (worker counts, intervals); no fingerprint sees it."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def listed(value: Any) -> Any:
    """`value` as it is, or what a command line lists in it: a JSON array, or words between commas."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return value.split(",")
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(
            f'{value} is no JSON array ({error}): write words between commas, or ["a", "b"]'
        ) from error


def result_fields(config: BaseModel) -> dict[str, Any]:
    """The JSON-ready fields of `config` that may change a result: all but the operational ones, at every depth."""
    fields: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        fields[name] = _jsonable(getattr(config, name), result_fields)
    return fields


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes. Refuses NaN."""
    return json.dumps(_jsonable(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(*parts: Any) -> str:
    """12 hex digits that name a computation: the start of the SHA-256 of the parts' canonical JSON.

    Of a config among the parts, only what `result_fields` keeps counts.
    """
    return hashlib.sha256(canonical_json(_jsonable(parts, result_fields))).hexdigest()[:12]


def _all_fields(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _jsonable(value: Any, fields_of: Callable[[BaseModel], dict[str, Any]] = _all_fields) -> Any:
    if isinstance(value, BaseModel):
        return fields_of(value)
    if isinstance(value, dict):
        return {str(k): _jsonable(v, fields_of) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v, fields_of) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(_jsonable(v, fields_of) for v in value)
    return value
