"""The fenced blocks of the documentation, and the marks that say how a test runs them.

A mark is an HTML comment in front of a block; readers do not see it:

    <!-- not run: needs a cluster -->      the block is only parsed, for this reason
    <!-- before: cp a.txt b.txt -->        hidden lines, in the block's language, that run before it

Blocks of a page run in their order, in one folder. Shell blocks run under `bash -e`, Python blocks as a script.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile
from pathlib import Path

import check_links

ROOT = Path(__file__).resolve().parents[2]

BLOCK = re.compile(
    r"(?P<marks>(?:^ *<!--(?:(?!-->)[\s\S])*-->\n+)*)"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>[\s\S]*?)^ *```$",
    re.MULTILINE,
)
MARK = re.compile(r"<!-- (not run|before): (.*?)\s*-->", re.DOTALL)
ASSIGNMENT = re.compile(r"\w+=")
RUN_LANGUAGES = ("sh", "python")
LANGUAGES = (*RUN_LANGUAGES, "json", "text")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page (relative to the repository), at a line (of its opening fence).

    not_run: why it is only parsed, or "". before: hidden lines that run first.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str = ""
    before: str = ""

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN_LANGUAGES and not self.not_run


@cache
def all_blocks() -> tuple[Block, ...]:
    """Those of every Markdown page of the repository but generated results."""
    pages = (page.relative_to(ROOT) for page in check_links.pages())
    return tuple(block for page in pages if "results" not in page.parts for block in blocks_of(page))


def blocks_of(page: Path, root: Path = ROOT) -> list[Block]:
    """The blocks of a page, in order."""
    text = (root / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        marks = dict(MARK.findall(match["marks"]))
        start = match.start("indent")
        found.append(
            Block(
                page=str(page),
                line=text.count("\n", 0, start) + 1,
                language=match["language"],
                text=textwrap.dedent(match["text"]),
                not_run=marks.get("not run", ""),
                before=textwrap.dedent(marks.get("before", "")),
            )
        )
    return found


def commands(shell: str, program: str) -> list[list[str]]:
    """The arguments of each call of a program in a shell text, as written: variables are not expanded."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        words = _words(line)
        starts = [0, *(place + 1 for place, word in enumerate(words) if _separates(word))]
        for start in starts:
            command = words[start:]
            end = next((place for place, word in enumerate(command) if _separates(word)), len(command))
            called = list(dropwhile(ASSIGNMENT.match, command[:end]))
            if called and (called[0] == program or called[0].endswith(f"/bin/{program}")):
                found.append(called[1:])
    return found


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a part of a quoted text of several lines
        return []


def _separates(word: str) -> bool:
    return word in ("do", "then", "{") or set(word) <= set(";&|()<>")
