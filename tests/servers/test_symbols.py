"""A new vLLM fails here first, by the name of what changed."""

from __future__ import annotations

import pytest

from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm import examination, symbols
from steer_engine.vllm.patching import Symbol, check_symbols
from steer_engine.vllm.plugin import register, register_api

MAX_WRAPPED = 38


@pytest.mark.parametrize("symbol", examination.all_symbols(), ids=lambda symbol: symbol.path)
def test_symbol_is_as_we_know_it(symbol: Symbol) -> None:
    assert symbol.problem() is None


def test_few_symbols_are_wrapped_and_each_is_checked() -> None:
    wrapped = symbols.wrapped()
    assert len(wrapped) <= MAX_WRAPPED
    assert len({symbol.path for symbol in wrapped}) == len(wrapped)
    assert set(wrapped) <= {*symbols.engine_symbols(), *symbols.api_symbols()}


def test_a_second_install_of_every_module_changes_nothing() -> None:
    register()
    register_api()
    owners = [symbol.owner() for symbol in symbols.wrapped()]
    added = [(owner, "steer") for owner in (ENGINE_CORE.get(), WORKER.get())]
    first = [owner.__dict__[name] for owner, name in (*owners, *added)]
    for module in (*symbols.ENGINE_MODULES, *symbols.api_modules()):
        module.install()
    register()
    register_api()
    second = [owner.__dict__[name] for owner, name in (*owners, *added)]
    assert all(before is after for before, after in zip(first, second, strict=True))
    for owner, name in owners:
        replacement = getattr(owner, name)
        assert hasattr(replacement, "__wrapped__")
        assert not hasattr(replacement.__wrapped__, "__steer_engine_wrapped__"), f"{name} is wrapped twice"


ENGINE_CORE = Symbol("vllm.v1.engine.core:EngineCore")
WORKER = Symbol("vllm.v1.worker.worker_base:WorkerBase")


def test_a_changed_vllm_is_named() -> None:
    gone = Symbol("vllm.entrypoints.serve.engine.serving:BaseServing._no_such_method")
    changed = Symbol("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("no_such_parameter",))
    with pytest.raises(UnsupportedEngineError, match=r"9\.9.*_no_such_method.*no_such_parameter"):
        check_symbols((gone, changed), "9.9")
