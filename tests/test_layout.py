"""The house: where each package comes from, and rules that hold for every file of it."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]
FLOORS = ("data", "training", "stages", "flows")
FILES = sorted(path for floor in FLOORS for path in (CHECKOUT / floor).rglob("*.py"))
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
LONGEST_FUNCTION = 90

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _contract(name: str) -> dict[str, Any]:
    """The import-linter contract of that name."""
    return next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["name"] == name)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(CHECKOUT)}:{getattr(node, 'lineno', 1)}"


def _calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Every call of a function or method of that name."""
    for path in FILES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                yield path, node


def _public(body: list[ast.stmt]) -> Iterator[Definition]:
    """Public definitions of a module, and the public methods of its public classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


@pytest.mark.parametrize("floor", FLOORS)
def test_each_floor_comes_from_this_checkout(floor: str) -> None:
    module = importlib.import_module(floor)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == CHECKOUT / floor / "__init__.py"


def test_every_floor_is_built_and_no_other_package_is() -> None:
    assert sorted(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(FLOORS)
    packages = {path.parent.name for path in CHECKOUT.glob("*/__init__.py")}
    assert packages == set(FLOORS)


def test_no_file_shadows_a_floor() -> None:
    """A folder on `sys.path` with such a file would be imported in the floor's place."""
    assert [path for path in FILES if path.stem in FLOORS] == []
    inner = {path.name for floor in FLOORS for path in (CHECKOUT / floor).rglob("*") if path.is_dir()}
    assert not inner & set(FLOORS)


def test_every_package_has_its_init_file() -> None:
    assert [path for path in FILES if not (path.parent / "__init__.py").exists()] == []


def test_every_stage_is_independent_of_the_others() -> None:
    listed = set(_contract("stages do not import each other")["modules"])
    assert {
        f"stages.{path.stem}" for path in CHECKOUT.glob("stages/*.py") if _defines_a_stage(path)
    } == listed


def _defines_a_stage(path: Path) -> bool:
    """Whether the module has a STAGE or STAGES of its own; the catalogue only collects those of others."""
    names = [
        ast.unparse(target)
        for node in _tree(path).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return path.stem != "catalogue" and bool({"STAGE", "STAGES"} & set(names))


def test_torch_stays_out_of_every_file_of_data_but_the_loader() -> None:
    listed = set(_contract("torch stays out of data, except in the loader")["source_modules"])
    modules = {f"data.{path.stem}" for path in CHECKOUT.glob("data/*.py")}
    assert listed == modules - {"data.loader", "data.__init__"}


def test_functions_are_short() -> None:
    functions = (
        (path, node)
        for path in FILES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [_place(p, n) for p, n in functions if n.end_lineno - n.lineno + 1 > LONGEST_FUNCTION]  # type: ignore[operator]
    assert long == []


def test_everything_public_says_what_it_is_for() -> None:
    assert [str(path) for path in FILES if not ast.get_docstring(_tree(path))] == []
    silent = [
        f"{_place(path, node)} {node.name}"
        for path in FILES
        for node in _public(_tree(path).body)
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_nothing_is_printed() -> None:
    assert [_place(path, call) for path, call in _calls("print") if ast.unparse(call.func) == "print"] == []


def test_nothing_is_unpickled() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.keyword):
                option = (node.arg, ast.unparse(node.value))
                found += [_place(path, node.value)] * (option in _UNPICKLING)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                is_free = bool(_imported(node) & {"pickle", "dill", "joblib"}) and path != _NUMBERS_ONLY
                found += [_place(path, node)] * is_free
    assert found == []


_NUMBERS_ONLY = CHECKOUT / "training" / "metrics" / "references.py"
"""Reads published statistics through an unpickler that can build arrays of numbers alone; its tests attack it."""
_UNPICKLING = {("allow_pickle", "True"), ("weights_only", "False")}


def _imported(node: ast.Import | ast.ImportFrom) -> set[str | None]:
    """The modules that an import makes usable; the name of an error that is to be caught is no use of its module."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return set() if all(alias.name.endswith("Error") for alias in node.names) else {node.module}


@pytest.mark.parametrize(
    ("function", "option"), [("np.load", "allow_pickle"), ("torch.load", "weights_only")]
)
def test_whoever_loads_says_that_it_is_no_pickle(function: str, option: str) -> None:
    loads = [(path, call) for path, call in _calls("load") if ast.unparse(call.func) == function]
    silent = [
        _place(path, call) for path, call in loads if option not in {word.arg for word in call.keywords}
    ]
    assert silent == []
