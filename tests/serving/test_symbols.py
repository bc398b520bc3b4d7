"""A new vLLM fails here first, by the name of what changed."""

from __future__ import annotations

import pytest

from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm import symbols
from steer_engine.vllm.patching import Symbol, check_symbols
from steer_engine.vllm.plugin import hook_serving
from steer_engine.vllm.plugin import register_serving as register


@pytest.mark.parametrize("symbol", [*symbols.WRAPPED, *symbols.USED, *symbols.COMMAND], ids=lambda s: s.path)
def test_symbol_is_as_we_know_it(symbol: Symbol) -> None:
    assert symbol.problem() is None


def test_hooking_wraps_each_symbol_once() -> None:
    register()
    hook_serving()
    first = [getattr(*symbol.owner()) for symbol in symbols.WRAPPED]
    register()
    hook_serving()
    assert [getattr(*symbol.owner()) for symbol in symbols.WRAPPED] == first
    assert all(hasattr(method, "__wrapped__") for method in first)


def test_a_changed_vllm_is_named() -> None:
    gone = Symbol("vllm.entrypoints.serve.engine.serving:BaseServing._no_such_method")
    changed = Symbol(symbols.CHECK_MODEL.path, ("no_such_parameter",))
    with pytest.raises(UnsupportedEngineError, match=r"9\.9.*_no_such_method.*no_such_parameter"):
        check_symbols((gone, changed), "9.9")
