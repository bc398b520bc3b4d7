"""How vLLM's functions are wrapped: by name, once, and only where the symbol looks as we know it."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from steer_engine.errors import UnsupportedEngineError

_MARK = "__steer_engine_wrapped__"


@dataclass(frozen=True)
class Symbol:
    """A function, method or class of vLLM that we wrap or use.

    path: `module:Class.method` or `module:function`. parameters: the names that we rely on, in any position.
    moved_to: where a later known release has it.
    """

    path: str
    parameters: tuple[str, ...] = ()
    moved_to: str | None = None

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    def owner(self) -> tuple[Any, str]:
        """The object that has the attribute, and the attribute's name."""
        if self.moved_to is not None:
            try:
                return _owner(self.moved_to)
            except (ImportError, AttributeError):
                pass  # an earlier release
        return _owner(self.path)

    def get(self) -> Any:
        """The function, method or class itself."""
        owner, name = self.owner()
        return getattr(owner, name)

    def problem(self) -> str | None:
        """How the symbol differs from the one that we know, or None."""
        try:
            function = inspect.unwrap(self.get())
        except (ImportError, AttributeError) as error:
            return f"{self.path} is missing ({error})"
        if not self.parameters:
            return None
        known = inspect.signature(function).parameters
        missing = [parameter for parameter in self.parameters if parameter not in known]
        return f"{self.path} has no parameter {', '.join(missing)}" if missing else None


Make = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the original function, returns its replacement."""


@dataclass(frozen=True)
class Patch:
    """One wrapped symbol: `make(original)` replaces it."""

    symbol: Symbol
    make: Make


def apply(patches: Iterable[Patch]) -> None:
    """Wrap every symbol. A second call changes nothing. Class methods stay class methods."""
    for patch in patches:
        owner, name = patch.symbol.owner()
        found = owner.__dict__.get(name, getattr(owner, name))
        original = found.__func__ if isinstance(found, classmethod) else found
        if getattr(original, _MARK, False):
            continue
        wrapped = functools.wraps(original)(patch.make(original))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)


def check_symbols(symbols: Iterable[Symbol], vllm_version: str) -> None:
    """Raise UnsupportedEngineError that names vLLM's version and every symbol that differs."""
    problems = [problem for symbol in symbols if (problem := symbol.problem())]
    if problems:
        raise UnsupportedEngineError(
            f"Steer Engine does not know vLLM {vllm_version}: {'; '.join(problems)}. Install a vLLM that it knows "
            "(0.32 or 0.33), or uninstall steer-engine to run this vLLM without steering."
        )


def _owner(path: str) -> tuple[Any, str]:
    module, _, qualified = path.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = qualified.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    getattr(owner, name)  # an AttributeError here, not later
    return owner, name
