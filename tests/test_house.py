"""The shape of the code: files that are one idea, functions that are read at once, tests that stand by themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("neg_service", "jobs", "infra", "tests")
MOST_OF_A_FILE, MOST_OF_A_FUNCTION = 400, 60

FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring: those of the library say much of what goes in and comes out."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    # `end_lineno` is None of trees that were not read from a text.
    return (function.end_lineno or 0) - function.lineno + 1 - documented * ((first.end_lineno or 0) - first.lineno + 1)


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MOST_OF_A_FUNCTION:
            yield f"{path.relative_to(ROOT)}: {node.name} has {length(node)} lines"


def test_files_and_functions_are_short() -> None:
    long = [str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > MOST_OF_A_FILE]
    assert [*long, *(said for path in FILES for said in long_functions(path))] == []


def test_no_test_file_imports_another() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path


def test_a_long_function_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_house.ROOT", tmp_path)
    body = "\n".join(["    x = 1"] * 60)
    (tmp_path / "a.py").write_text(f'def short():\n    """Says\n\n    much."""\n{body[:-10]}\n\ndef long():\n{body}\n')
    assert list(long_functions(tmp_path / "a.py")) == ["a.py: long has 61 lines"]
