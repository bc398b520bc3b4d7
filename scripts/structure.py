"""The size and shape of the package steer_engine, against the targets of this project.

    scripts/structure.py

Prints one line per number. Ends with 1 if a number exceeds its target.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "steer_engine"

SHORT_LINES = 40
"""A file with fewer lines is short."""

MAX_MODULES = 162
"""130 for what the project did when its rooms were built; what it has learned since may add some."""
MAX_SHORT_PERCENT = 8.0
MAX_SINGLE_IMPORTER_PERCENT = 20.0
MAX_LINES_OF_A_FILE = 400
MAX_CYCLES = 0
MAX_WRAPPED_SYMBOLS = 38

ENTRY_POINTS = ("steer_engine.cli.main", "steer_engine.vllm.plugin")

Graph = Mapping[str, frozenset[str]]
"""Module -> the modules of the package that it imports."""


@dataclass(frozen=True)
class Measurement:
    """One number, and its target if it has one."""

    name: str
    value: float
    target: float | None = None
    unit: str = ""
    detail: str = ""

    @property
    def exceeded(self) -> bool:
        return self.target is not None and self.value > self.target

    def __str__(self) -> str:
        value = f"{self.value:.1f}" if self.unit == "%" else f"{self.value:,.0f}"
        target = "" if self.target is None else f"  (at most {self.target:g})"
        mark = "  EXCEEDED" if self.exceeded else ""
        return f"{self.name:42} {value:>7} {self.unit:1}{target}{mark}{f'  {self.detail}' if self.detail else ''}"


def main() -> int:
    measured = measure(PACKAGE)
    for each in measured:
        print(each)
    return int(any(each.exceeded for each in measured))


def measure(package: Path) -> list[Measurement]:
    """All numbers of a package. The wrapped symbols are those of the installed steer_engine."""
    files = modules(package)
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    short = sorted(name for name, path in files.items() if lines[name] < SHORT_LINES and not path.stem.startswith("__"))
    longest = max(lines, key=lines.__getitem__)
    graph = import_graph(files)
    single = single_importer(graph)
    found = cycles(graph)
    return [
        Measurement("modules", len(files), MAX_MODULES),
        Measurement("lines", sum(lines.values())),
        Measurement(f"files under {SHORT_LINES} lines", percent(short, files), MAX_SHORT_PERCENT, "%", " ".join(short)),
        Measurement(
            "modules with a single importer", percent(single, files), MAX_SINGLE_IMPORTER_PERCENT, "%", " ".join(single)
        ),
        Measurement("lines of the largest file", lines[longest], MAX_LINES_OF_A_FILE, detail=longest),
        Measurement("import cycles", len(found), MAX_CYCLES, detail="; ".join(" <-> ".join(each) for each in found)),
        Measurement("wrapped vLLM symbols", wrapped_symbols(), MAX_WRAPPED_SYMBOLS),
    ]


def percent(part: list[str], whole: Mapping[str, Path]) -> float:
    return 100 * len(part) / len(whole)


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(files: Mapping[str, Path]) -> Graph:
    """Which module imports which: at the top, inside functions, and for type checkers.

    A name that a package's `__init__` re-exports counts as imported from the module that defines it, too.
    """
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    packages = {name for name, path in files.items() if path.stem == "__init__"}
    origins = {
        (package, imported): module
        for package in packages
        for module, imported in imported_names(trees[package], package, is_package=True)
        if module in files
    }

    def targets(name: str) -> Iterator[str]:
        for module, imported in imported_names(trees[name], name, is_package=name in packages):
            submodule = f"{module}.{imported}"
            yield from [submodule] if submodule in files else [module, origins.get((module, imported), "")]

    return {name: frozenset(each for each in targets(name) if each in files and each != name) for name in files}


def imported_names(tree: ast.AST, name: str, *, is_package: bool) -> Iterator[tuple[str, str]]:
    """(module, name) of each `from module import name`, and (module, "") of each `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, name, is_package=is_package)
            yield from ((module, alias.name) for alias in node.names)


def single_importer(graph: Graph) -> list[str]:
    """Modules that exactly one other module imports. Entry points are left out: the installer's script imports them."""
    importers = Counter(target for targets in graph.values() for target in targets)
    return sorted(name for name, count in importers.items() if count == 1 and name not in ENTRY_POINTS)


def absolute(node: ast.ImportFrom, name: str, *, is_package: bool) -> str:
    """The dotted name after `from`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected components).

    The root package is left out: it loads the public names from the modules below it when they are used.
    """
    inner = {name: frozenset(t for t in targets if "." in t) for name, targets in graph.items() if "." in name}
    reachable = {name: reach(inner, name) for name in inner}
    groups = {
        tuple(sorted(other for other in reachable[name] if name in reachable[other]))
        for name in inner
        if name in reachable[name]
    }
    return [list(group) for group in sorted(groups)]


def reach(graph: Graph, start: str) -> set[str]:
    """Modules that `start` imports, directly or through others. Holds `start` itself only if it is in a cycle."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


def wrapped_symbols() -> int:
    """Number of functions and methods of vLLM that the installed steer_engine replaces."""
    from steer_engine.vllm import symbols

    return len({symbol.path for symbol in symbols.wrapped()})


if __name__ == "__main__":
    sys.exit(main())
