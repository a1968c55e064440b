"""What CONTRIBUTING.md says of the layout: which way imports go, and how long a file, a class and a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for path in (ROOT / "fastfisher").rglob("*.py") if path.parts[-2] != "kernels")

WAYS = {
    "ops": {"", "kernels"},
    "engine": {"", "ops"},
    "distributed": {"", "ops", "engine"},
    "penalise": {"", "ops", "engine", "distributed"},
    "measure": {"", "ops", "engine", "distributed"},
    "integrations": {"", "engine", "penalise", "measure"},
    "training": {"", "ops", "engine", "distributed", "penalise", "measure"},
    "paper": {"", "training", "measure"},
}
"""Which packages the modules of each may import: those further down. "" are the files of fastfisher/ itself."""

TABLES = {"engine/piecewise/rules.py", "engine/taylor/rules.py"}
"""Files that are a table of rules: one rule is short, and there are as many as PyTorch has functions."""

ENTRIES = {"fastfisher", "fastfisher.__main__", "fastfisher.cli", "fastfisher.info"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that importing this one imports, and those that its functions import later."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastfisher")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastfisher"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name in MODULES}
            found |= modules | ({node.module or ""} if names - modules else set())
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def package_of(module: str) -> str:
    _, *rest = module.split(".")
    return rest[0] if rest and rest[0] in (*WAYS, "kernels") else ""


@pytest.mark.parametrize("package", WAYS)
def test_imports_go_down(package: str) -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if package_of(name) == package and package_of(other) not in WAYS[package] | {package}
    ]
    assert not wrong


def test_imports_have_no_circle() -> None:
    graph = {name: others & MODULES.keys() - {name} for name, others in IMPORTS.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_library_imports_no_program() -> None:
    """The files of fastfisher/ itself stand below all packages, but for those that make the public face."""
    programs = {"training", "paper", "integrations"}
    for name, others in IMPORTS.items():
        if package_of(name) not in programs and name not in ENTRIES:
            assert not {package_of(other) for other in others} & programs, name


def lengths() -> Iterator[tuple[str, int, int]]:
    """Each function and class with its lines, and at most so many that it may have; its docstring apart where it is a
    function, whose arguments are said there."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines, most = (node.end_lineno or 0) - node.lineno + 1, 320
                if isinstance(node, ast.FunctionDef):
                    doc = node.body[0] if ast.get_docstring(node) is not None else None
                    lines, most = lines - ((doc.end_lineno or 0) - doc.lineno + 1 if doc else 0), 60
                yield f"{path.relative_to(ROOT)}: {node.name}", lines, most


def test_no_function_and_no_class_is_too_long() -> None:
    assert not [f"{name} has {lines} lines" for name, lines, most in lengths() if lines > most]


def test_no_file_is_too_long() -> None:
    sizes = {str(path.relative_to(ROOT / "fastfisher")): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: size for name, size in sizes.items() if size > 400 and name not in TABLES}
