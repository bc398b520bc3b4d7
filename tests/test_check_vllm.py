"""The check of a vLLM release by its source: the installed one passes, differences are reported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import check_vllm
import pytest

from steer_engine.vllm.patching import Symbol


def test_the_installed_vllm_is_known_by_its_source() -> None:
    from steer_engine.vllm.examination import all_symbols

    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parents[1]

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text() if file.is_file() else None

    symbols = all_symbols()
    assert len(symbols) > 40
    assert check_vllm.problems(symbols, read) == []


def test_every_import_of_vllm_is_on_a_list() -> None:
    """An import that is on no list would break with a new vLLM without a clear message."""
    from steer_engine.vllm.examination import all_symbols

    known = {symbol.path for symbol in all_symbols()}
    files = sorted((Path(__file__).resolve().parents[1] / "steer_engine").rglob("*.py"))
    found = {name: file.name for file in files for name in imported_from_vllm(ast.parse(file.read_text()))}
    assert len(found) >= 25
    unknown = {name: file for name, file in found.items() if not any(is_under(path, name) for path in known)}
    assert unknown == {}


def is_under(path: str, imported: str) -> bool:
    """Whether a symbol's path is the imported name, a part of it, or inside it if it is a module."""
    return f"{path}.".startswith(f"{imported}.") or path.startswith(f"{imported.replace(':', '.')}:")


def imported_from_vllm(tree: ast.AST) -> Iterator[str]:
    """`module:name` of each runtime import. Imports for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            for each in node.names:
                yield f"{node.module}:{each.name}"
        yield from imported_from_vllm(node)


SOURCES = {
    "lib/__init__.py": "from lib.inner import Base as Public\n",
    "lib/inner.py": "from other import Far\nclass Model(Far): ...\n"
    "class Root:\n    def run(self, a, *, b): ...\nclass Base(Root):\n    size: int = 3\n",
}


@pytest.mark.parametrize(
    ("path", "parameters", "problem"),
    [
        ("lib.inner:Base.run", ("a", "b"), None),
        ("lib.inner:Model.__init__", (), None),
        ("lib.inner:Model.run", (), "lib.inner:Model.run is missing"),
        ("lib:Public.run", ("b",), None),
        ("lib:Public.size", (), None),
        ("lib:Public.run", ("c",), "lib:Public.run has no parameter c"),
        ("lib:Public.walk", (), "lib:Public.walk is missing"),
        ("lib.outer:Public", (), "lib.outer:Public is missing"),
        ("lib:Public.size", ("a",), "lib:Public.size is not a function"),
    ],
)
def test_differences_are_named(path: str, parameters: tuple[str, ...], problem: str | None) -> None:
    assert check_vllm.problem_of(Symbol(path, parameters), SOURCES.get) == problem
