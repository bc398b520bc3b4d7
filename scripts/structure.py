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

MAX_MODULES = 130
MAX_SHORT_PERCENT = 8.0
MAX_SINGLE_IMPORTER_PERCENT = 20.0
MAX_LINES_OF_A_FILE = 400
MAX_CYCLES = 0
MAX_WRAPPED_SYMBOLS = 33

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
    graph = {name: frozenset(imports(name, path, files)) for name, path in files.items()}
    short = sorted(name for name, path in files.items() if lines[name] < SHORT_LINES and not path.stem.startswith("__"))
    importers = Counter(target for targets in graph.values() for target in targets)
    single = sorted(name for name, count in importers.items() if count == 1)
    longest = max(lines, key=lines.__getitem__)
    found = cycles(graph)
    return [
        Measurement("modules", len(files), MAX_MODULES),
        Measurement("lines", sum(lines.values())),
        Measurement(
            f"files under {SHORT_LINES} lines", percent(short, files), MAX_SHORT_PERCENT, "%", ", ".join(short)
        ),
        Measurement("modules with a single importer", percent(single, files), MAX_SINGLE_IMPORTER_PERCENT, "%"),
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


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports when it runs: at the top, and inside functions."""
    for node in running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, name, is_package=path.stem == "__init__")
            # `from package import module` imports the module; `from module import name` imports the module `module`.
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target in known and target != name)


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node except those under `if TYPE_CHECKING:`, which never run."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from running(child)


def absolute(node: ast.ImportFrom, name: str, *, is_package: bool) -> str:
    """The dotted name after `from`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected components)."""
    reachable = {name: reach(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reachable[name] if name in reachable[other]))
        for name in graph
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
