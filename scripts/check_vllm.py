"""Check a vLLM release for every symbol that Steer Engine wraps or uses, in its source, without importing it.

    scripts/check_vllm.py [VERSION | path of a wheel] [--since VERSION | path of a wheel]

Downloads the wheel of vllm (the newest, or VERSION) from pip's package index, and compares names and parameters with
those that the installed steer-engine needs. Ends with 1 if one is missing.

Then reports what the symbols do not show, against the version that is known (the installed one, or --since): classes
that redefine a method on the list, so that a wrapper of the base class's method is not called; and functions whose body
is another one. Read these; they do not change the exit status.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from steer_engine.vllm.patching import Symbol

Read = Callable[[str], str | None]
"""Path inside the distribution -> its text, or None if the file does not exist."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Source:
    """The Python files of a vLLM. name: what it is called in the report."""

    name: str
    files: tuple[str, ...]
    read: Read


class Definition(NamedTuple):
    """Where a name is defined: module, qualified name inside it, and the syntax tree."""

    module: str
    name: str
    node: ast.AST


def problems(symbols: Iterable[Symbol], read: Read) -> list[str]:
    """How the source differs from the known symbols."""
    found = (problem_of(symbol, read) for symbol in symbols)
    return [problem for problem in found if problem is not None]


def problem_of(symbol: Symbol, read: Read) -> str | None:
    found = definition_of(symbol, read)
    if found is None:
        return f"{symbol.path} is missing"
    if not symbol.parameters:
        return None
    node = found.node
    if not isinstance(node, Function):
        return f"{symbol.path} is not a function"
    arguments = node.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    names = {each.arg for each in every if each is not None}
    missing = [name for name in symbol.parameters if name not in names]
    return f"{symbol.path} has no parameter {', '.join(missing)}" if missing else None


def definition_of(symbol: Symbol, read: Read) -> Definition | None:
    """Where a symbol is defined, at its new place or at its old one."""
    paths = [path for path in (symbol.moved_to, symbol.path) if path is not None]
    found = (find(path.partition(":")[0], path.partition(":")[2].split("."), read) for path in paths)
    return next((each for each in found if each is not None), None)


def redefinitions(symbols: Iterable[Symbol], source: Source) -> set[str]:
    """`module:Class.method` of each class that redefines a method on the list and derives from the class named there.

    A wrapper of the listed method does not run for such a class, unless its method calls the base class's. Constructors
    do so and are left out.
    """
    owners: dict[str, set[tuple[str, str]]] = {}
    for symbol in symbols:
        module, _, names = (symbol.moved_to or symbol.path).partition(":")
        owner, _, method = names.rpartition(".")
        if not owner or method == "__init__":
            continue
        for path in (f"{module}:{owner}", f"{symbol.module}:{owner}"):  # a class may be in its old place
            found = definition_of(Symbol(path), source.read)
            if found is not None and isinstance(found.node, ast.ClassDef):
                owners.setdefault(method, set()).add((found.module, found.name))
    return {
        f"{module}:{name}.{method}"
        for module, name, node, method in _methods_called(set(owners), source)
        if bases_of(module, node, source.read) & owners[method] and (module, name) not in owners[method]
    }


def _methods_called(wanted: set[str], source: Source) -> Iterator[tuple[str, str, ast.ClassDef, str]]:
    """Module, name and tree of every class that defines a method with one of these names, and the method's name."""
    for path in source.files:
        text = source.read(path) or ""
        # Parsing is slow, and few files have such a method.
        if not any(f"def {method}(" in text for method in wanted):
            continue
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.ClassDef):
                names = {each.name for each in node.body if isinstance(each, Function)}
                for method in sorted(names & wanted):
                    yield module, node.name, node, method


def bases_of(module: str, node: ast.ClassDef, read: Read) -> set[tuple[str, str]]:
    """Module and name of each class that a class derives from, as far as the source has them."""
    found: set[tuple[str, str]] = set()
    for base in node.bases:
        named = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
        at = find(module, [named.id], read) if isinstance(named, ast.Name) else None
        if at is not None and isinstance(at.node, ast.ClassDef) and (at.module, at.name) != (module, node.name):
            found |= {(at.module, at.name)} | bases_of(at.module, at.node, read)
    return found


def changed_bodies(symbols: Iterable[Symbol], known: Source, new: Source) -> list[str]:
    """Paths of the functions on the list that do something else than in the known version; comments do not count."""
    changed = []
    for symbol in symbols:
        before, after = definition_of(symbol, known.read), definition_of(symbol, new.read)
        if before is None or after is None or not isinstance(before.node, Function):
            continue
        if not isinstance(after.node, Function) or _code(before.node) != _code(after.node):
            changed.append(symbol.path)
    return sorted(set(changed))


def _code(node: Function) -> str:
    """A function's text without its docstring, comments and layout."""
    has_docstring = ast.get_docstring(node) is not None
    return ast.dump(ast.Module(body=node.body[has_docstring:], type_ignores=[])) + ast.dump(node.args)


def find(module: str, names: list[str], read: Read) -> Definition | None:
    """The definition of a (nested) name. Follows imports and base classes."""
    path = module.replace(".", "/")
    package = read(f"{path}/__init__.py")
    text = read(f"{path}.py") or package
    if text is None:
        return None
    scope: ast.AST = parsed(text)
    tree = scope
    for depth, name in enumerate(names):
        inside = member(scope, name)
        if isinstance(inside, ast.ImportFrom):
            here = f"{module}.__init__" if text is package else module
            return find(absolute(inside, here), [origin(inside, name), *names[depth + 1 :]], read)
        if inside is None and isinstance(scope, ast.ClassDef):
            bases = [base.id for base in scope.bases if isinstance(base, ast.Name)]
            inherited = (find(module, [base, *names[depth:]], read) for base in bases if member(tree, base) is not None)
            # Every class has a constructor. If a base class of another package defines it, it is not in this source.
            unknown = Definition(module, ".".join(names), scope) if name == "__init__" else None
            return next((each for each in inherited if each is not None), unknown)
        if inside is None:
            here = f"{module}.__init__" if text is package else module
            from_stars = (find(absolute(star, here), names[depth:], read) for star in star_imports(scope))
            return next((each for each in from_stars if each is not None), None)
        scope = inside
    return Definition(module, ".".join(names), scope)


@lru_cache(maxsize=512)
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def member(scope: ast.AST, name: str) -> ast.AST | None:
    """The definition, assignment or import of `name` in a module or class."""
    body: list[ast.stmt] = list(getattr(scope, "body", []))
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            body.extend([*node.body, *node.orelse])
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            return node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


def star_imports(scope: ast.AST) -> list[ast.ImportFrom]:
    """`from module import *` of a module, the last one first: it takes precedence."""
    body = reversed(scope.body) if isinstance(scope, ast.Module) else ()
    return [node for node in body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]


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
    return next(folder.glob(f"vllm-{version or '*'}-*.whl"))


def of_wheel(wheel: Path) -> Source:
    archive = zipfile.ZipFile(wheel)
    texts = {name for name in archive.namelist() if name.endswith(".py")}
    return Source(
        name=wheel.name,
        files=tuple(sorted(texts)),
        read=lru_cache(maxsize=512)(lambda path: archive.read(path).decode() if path in texts else None),
    )


def installed() -> Source:
    """The vLLM of this environment."""
    from steer_engine.vllm.symbols import vllm_version

    found = importlib.util.find_spec("vllm")
    assert found is not None, "steer-engine needs vLLM"
    assert found.origin is not None
    root = Path(found.origin).parents[1]

    @lru_cache(maxsize=512)
    def read(path: str) -> str | None:
        file = root / path
        return file.read_text() if file.is_file() else None

    files = tuple(sorted(str(file.relative_to(root)) for file in (root / "vllm").rglob("*.py")))
    return Source(name=f"the installed vllm {vllm_version()}", files=files, read=read)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="version of vllm or path of a wheel (default: the newest version)")
    parser.add_argument("--since", help="the known version, or path of its wheel (default: the installed vLLM)")
    given = parser.parse_args()
    from steer_engine.vllm.examination import all_symbols

    symbols = all_symbols()
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:

        def source(version: str | None) -> Source:
            is_wheel = version is not None and version.endswith(".whl")
            return of_wheel(Path(str(version)) if is_wheel else download(version, Path(folder)))

        new = source(given.version)
        known = source(given.since) if given.since else installed()
        different = problems(symbols, new.read)
        for problem in different:
            console.print(f"[red]{problem}[/]")
        console.print(f"{new.name}: {len(symbols) - len(different)} of {len(symbols)} symbols are as expected")
        report = {
            "redefined in a class that does not do so in": sorted(
                redefinitions(symbols, new) - redefinitions(symbols, known)
            ),
            "another body than in": changed_bodies(symbols, known, new),
        }
    for what, paths in report.items():
        console.print(f"{what} {known.name}: {len(paths) or 'none'}")
        for path in paths:
            console.print(f"  [yellow]{path}[/]")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
