"""Check a vLLM release for every symbol that Steer Engine wraps or uses, in its source, without importing it.

    scripts/check_vllm.py [VERSION | path of a wheel]

Downloads the wheel of vllm (the newest, or VERSION) from pip's package index, and compares names and parameters with
those that the installed steer-engine needs. Ends with 1 if one is missing.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from steer_engine.vllm.patching import Symbol

Read = Callable[[str], str | None]
"""Path inside the distribution -> its text, or None if the file does not exist."""


def problems(symbols: Iterable[Symbol], read: Read) -> list[str]:
    """How the source differs from the known symbols."""
    found = (problem_of(symbol, read) for symbol in symbols)
    return [problem for problem in found if problem is not None]


def problem_of(symbol: Symbol, read: Read) -> str | None:
    paths = [path for path in (symbol.moved_to, symbol.path) if path is not None]
    nodes = (find(path.partition(":")[0], path.partition(":")[2].split("."), read) for path in paths)
    node = next((node for node in nodes if node is not None), None)
    if node is None:
        return f"{symbol.path} is missing"
    if not symbol.parameters:
        return None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{symbol.path} is not a function"
    arguments = node.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    names = {each.arg for each in every if each is not None}
    missing = [name for name in symbol.parameters if name not in names]
    return f"{symbol.path} has no parameter {', '.join(missing)}" if missing else None


def find(module: str, names: list[str], read: Read) -> ast.AST | None:
    """The definition of a (nested) name. Follows imports and base classes."""
    path = module.replace(".", "/")
    text = read(f"{path}.py") or read(f"{path}/__init__.py")
    if text is None:
        return None
    scope: ast.AST = ast.parse(text)
    tree = scope
    for depth, name in enumerate(names):
        inside = member(scope, name)
        if isinstance(inside, ast.ImportFrom):
            return find(absolute(inside, module), [origin(inside, name), *names[depth + 1 :]], read)
        if inside is None and isinstance(scope, ast.ClassDef):
            bases = [base.id for base in scope.bases if isinstance(base, ast.Name)]
            inherited = (find(module, [base, *names[depth:]], read) for base in bases if member(tree, base) is not None)
            # Every class has a constructor. If a base class of another package defines it, it is not in this source.
            return next((node for node in inherited if node is not None), scope if name == "__init__" else None)
        if inside is None:
            return None
        scope = inside
    return scope


def member(scope: ast.AST, name: str) -> ast.AST | None:
    """The definition, assignment or import of `name` in a module or class."""
    body: list[ast.stmt] = list(getattr(scope, "body", []))
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            body.extend([*node.body, *node.orelse])
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            return node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


def absolute(node: ast.ImportFrom, module: str) -> str:
    base = module.split(".")[: -node.level] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def origin(node: ast.ImportFrom, name: str) -> str:
    return next(each.name for each in node.names if (each.asname or each.name) == name)


def download(version: str | None, folder: Path) -> Path:
    wanted = "vllm" if version is None else f"vllm=={version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
        wanted,
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("vllm-*.whl"))


def reader_of(wheel: Path) -> Read:
    archive = zipfile.ZipFile(wheel)
    known = set(archive.namelist())
    return lambda path: archive.read(path).decode() if path in known else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="version of vllm or path of a wheel (default: the newest version)")
    version = parser.parse_args().version
    from steer_engine.vllm.examination import all_symbols

    symbols = all_symbols()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(version) if version and version.endswith(".whl") else download(version, Path(folder))
        different = problems(symbols, reader_of(wheel))
    for problem in different:
        console.print(f"[red]{problem}[/]")
    console.print(f"{wheel.name}: {len(symbols) - len(different)} of {len(symbols)} symbols are as expected")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
