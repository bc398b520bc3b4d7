"""Generated damage of files: what a broken disk, a broken tool or an attacker makes of a good one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

PIECES = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b"1e999",
    b"-1",
    b"NaN",
    b"9" * 5_000,
    b'"\\ud800"',
    b"null",
    b"\xff" * 8,
    b"\0" * 7 + b"\x40",
)
"""What is put into a file: empty, binary, nested and huge values, and 64-bit numbers."""


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` after one to three changes: cut, one byte changed, a range replaced by one of `PIECES`."""
    data = good
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(("cut", "byte", "piece")))
        if change == "cut":
            data = data[:at]
        elif change == "byte":
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        else:
            data = data[:at] + draw(st.sampled_from(PIECES)) + data[at + draw(st.integers(0, 20)) :]
    return data


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 33)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "loop": _loop,
    "dangling": _dangling,
    "device": _endless,
    "folder": Path.mkdir,
    "huge": _huge,
}
"""What may be at a path instead of a file of a few bytes; opening or reading some of them never ends."""
