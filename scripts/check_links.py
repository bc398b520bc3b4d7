"""Check the Markdown pages' links to files and headings of this repository, and the paths that they name in code spans.

    scripts/check_links.py    print each broken link as PAGE:LINE: what is wrong; end with 1 if there is one

Addresses on the web are not opened.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FENCE = re.compile(r"^ *```")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^(#{1,6}) +(.+?) *$")
OUTSIDE = re.compile(r"^(?:[a-z]+:|//)")
"""A target with a scheme, or on another host."""

OUR_PATH = re.compile(r"^(?:benchmarks|deploy|docs|examples|scripts|steer_engine|tests|triton_kernels)/[\w./-]*\w/?$")
"""A code span that names a file or a folder of the repository."""


def pages() -> list[Path]:
    """Every Markdown page that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return sorted({ROOT / name for name in listed if name and (ROOT / name).exists()})


def faults_of(page: Path, root: Path = ROOT) -> list[str]:
    """One line for each link or path of a page that leads nowhere."""
    where = page.relative_to(root)
    docs = root / "docs"
    found = []
    for number, line in prose(page.read_text()):
        for path in (span for span in CODE.findall(line) if OUR_PATH.match(span)):
            if not (root / path).exists():
                found.append(f"{where}:{number}: there is no {path}")
        for first, second in LINK.findall(CODE.sub("", line)):
            target = first or second
            if OUTSIDE.match(target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                found.append(f"{where}:{number}: {target} does not exist")
            elif docs in page.parents and docs not in (file, *file.parents):
                found.append(f"{where}:{number}: {target} is not part of the documentation site")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                found.append(f"{where}:{number}: {name or where.name} has no heading #{anchor}")
    return found


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of the lines outside fenced blocks and comments."""
    text = COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    fenced = False
    for number, line in enumerate(text.split("\n"), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings that GitHub and MkDocs agree on."""
    matches = (HEADING.match(line) for _, line in prose(page.read_text()))
    words = [re.sub(r"[^\w\- ]", "", plain(match[2])).strip().lower() for match in matches if match]
    by_github = {each.replace(" ", "-") for each in words}
    by_mkdocs = {re.sub(r"[-\s]+", "-", each) for each in words}
    return by_github & by_mkdocs


def plain(heading: str) -> str:
    """A heading without the marks of links."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)


def main() -> int:
    found = [fault for page in pages() for fault in faults_of(page)]
    print("\n".join(found) if found else f"{len(pages())} pages: every link leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
