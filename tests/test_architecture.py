"""Imports go one way: the tables of docs/architecture.md hold, and neither folders nor files form a circle."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"llm_surgeon": ROOT / "python" / "llm_surgeon", "surgeon_kernels": ROOT / "surgeon_kernels"}


@cache
def modules(package: str) -> dict[str, Path]:
    """Every module of ``package`` by its full name."""
    folder = PACKAGES[package]
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports(package: str) -> dict[str, set[str]]:
    """Module -> every module that it imports, in functions and under ``TYPE_CHECKING`` as well.

    ``from a import b`` imports ``a.b`` where that is a module of the package, else ``a``.
    """
    known, found = modules(package), {}
    for module, path in known.items():
        uses = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                uses |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None and node.level == 0, f"{path} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                uses |= {name if name in known else node.module for name in names}
        found[module] = uses
    return found


def graph(package: str) -> dict[str, set[str]]:
    """The part of :func:`imports` that lies inside ``package``."""
    return {module: uses & modules(package).keys() for module, uses in imports(package).items()}


def layers(package: str) -> list[str]:
    """The first column of the package's table in docs/architecture.md, as full names."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split(f"## `{package}`")[1].split("\n## ")[0]
    names = re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE)
    return [name if name == package else f"{package}.{name}" for name in names]


def layer_of(module: str, order: list[str]) -> str:
    """The most specific line of the table that ``module`` belongs to."""
    package = module.partition(".")[0]
    lines = [line for line in order if line != package and (module == line or module.startswith(f"{line}."))]
    return max(lines, key=len) if lines or module != package else package


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_its_line_and_every_line_a_module(package: str) -> None:
    order = layers(package)
    assert len(set(order)) == len(order)
    assert {layer_of(module, order) for module in modules(package)} == set(order)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_imports_only_from_lines_above_its_own(package: str) -> None:
    order = layers(package)
    wrong = [
        f"{module} imports {use}"
        for module, uses in graph(package).items()
        for use in sorted(uses)
        if order.index(layer_of(use, order)) > order.index(layer_of(module, order))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    try:
        TopologicalSorter(graph(package)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_need_torch_and_triton_alone() -> None:
    allowed = {*sys.stdlib_module_names, "surgeon_kernels", "torch", "triton"}
    needed = {use.partition(".")[0] for uses in imports("surgeon_kernels").values() for use in uses}
    assert needed <= allowed
