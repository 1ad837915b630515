"""What benchmarks import is there: they are run seldom, and many of their imports only as they go."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "tests" / "benchmarks").rglob("*.py"))


def file_of(module: str) -> Path | None:
    """The file of a module of this repository."""
    place = ROOT / module.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a file defines at its top, or may: `__getattr__` gives anything."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {each.asname or each.name for each in node.names}
    return frozenset(names)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(benchmark: Path) -> None:
    ours = ("mmoe_rec", "pipelines", "tests")
    for node in ast.walk(ast.parse(benchmark.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for each in node.names:
                assert each.name.split(".")[0] not in ours or file_of(each.name), each.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ours:
            package = ROOT / node.module.replace(".", "/")
            path = file_of(node.module)
            assert path is not None or package.is_dir(), node.module
            known = names_in(path) if path is not None else frozenset[str]()
            for each in node.names:
                found = each.name in known or "__getattr__" in known or file_of(f"{node.module}.{each.name}")
                assert found, f"{node.module}.{each.name}"
