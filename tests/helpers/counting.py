"""Counts calls in this process: of any method, and of the function that resolves specs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from steer_engine import resolve as module


@contextmanager
def counting(owner: Any, name: str) -> Iterator[list[Any]]:
    """Arguments of the calls of a method of one object while the block runs."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        delattr(owner, name)


@contextmanager
def counted_resolving() -> Iterator[list[Any]]:
    """One entry per call of `steer_engine.resolve.resolve`, whichever module calls it."""
    original = module.resolve
    calls: list[Any] = []

    def resolve(spec: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(spec)
        return original(spec, *args, **kwargs)

    users = [
        user
        for name, user in list(sys.modules.items())
        if name.startswith("steer_engine") and getattr(user, "resolve", None) is original
    ]
    for user in users:
        user.resolve = resolve  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        for user in users:
            user.resolve = original  # type: ignore[attr-defined]
