"""The files under infra/, read once, and what they must agree with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
INFRA = CHECKOUT / "infra"
SCHEMAS = Path(__file__).parent / "schemas"
EXACT = re.compile(r"^[a-z0-9./-]+:v?[0-9]+\.[0-9]+(\.[0-9]+)?(-[a-z0-9.]+)*$")
"""An image at one version: no `latest`, no version that moves within a major one."""


def read_yaml(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    """The version that constraints.txt has of `package`."""
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.partition("==")[0] == package)


def our_image(target: str) -> str:
    """The name of the image that the Dockerfile's `target` becomes."""
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    return f"darkroom:{version}-{target}"


def is_pinned(image: str) -> bool:
    """Whether `image` is one that stays what it is."""
    return bool(EXACT.match(image))


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """infra/compose.yaml with its anchors merged."""
    return read_yaml(INFRA / "compose.yaml")
