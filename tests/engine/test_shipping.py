"""Vectors reach the engine before the requests that need them, also where others make room there meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from driving import edit, generate, sampled, steering, tokens
from engines import random_vector

from steer_engine import LLM, __version__
from steer_engine.runtime.held import FRESH_SECONDS, Held
from steer_engine.runtime.vllm import engine_core, shipping

PROMPT = tokens(0, 12)
SPEC = steering(edit("r9", 2.0))
DIGEST = random_vector(9).digest

pytestmark = pytest.mark.v1_only  # the runner has no part in it


@pytest.fixture
def clock(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that this API process has; its beliefs begin anew."""
    now = [0.0]
    monkeypatch.setattr(tiny._frontend, "held", Held(lambda: now[0]))
    return now


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that the engine core is asked for."""
    found: list[str] = []
    original = shipping.call

    def call(llm_engine: Any, method: str, *args: Any) -> Any:
        found.append(method)
        return original(llm_engine, method, *args)

    monkeypatch.setattr(shipping, "call", call)
    return found


def answer(llm: LLM, spec: Any = SPEC) -> tuple[list[int], list[float]]:
    return sampled(generate(llm, [PROMPT], [spec])[0])


def test_a_vector_is_sent_once_and_asked_for_later(tiny: LLM, clock: list[float], calls: list[str]) -> None:
    first = answer(tiny)
    assert calls == ["steer_put"]
    assert answer(tiny) == first
    assert calls == ["steer_put"]
    clock[0] += FRESH_SECONDS
    assert answer(tiny) == first
    assert calls == ["steer_put", "steer_hold"]


def test_a_vector_that_another_process_pushed_out_comes_back(tiny: LLM, clock: list[float], calls: list[str]) -> None:
    first = answer(tiny)
    assert shipping.call(tiny.llm_engine, "steer_drop", DIGEST) == {"ok": True}
    clock[0] += FRESH_SECONDS
    calls.clear()
    assert answer(tiny) == first != answer(tiny, None)
    assert calls == ["steer_hold", "steer_put"]
    assert DIGEST in tiny.steering_status()["vectors"]


def test_statuses_of_several_engines_are_one() -> None:
    worker: dict[str, Any] = dict.fromkeys(("armed_blocks", "forms", "ops", "rows", "hidden_size", "dtype"), 1)
    worker["version"] = __version__
    status = {"ok": True, "workers": [worker, worker], "vectors": []}
    merged = shipping.check_status([status, status])
    assert [each["engine"] for each in merged["workers"]] == [0, 0, 1, 1]


class OneRankFails:
    """An engine core of two ranks, the second of which has no memory left; for `steer_put` as a plain function."""

    def __init__(self) -> None:
        self.ranks: list[set[str]] = [set(), set()]
        self.scheduler = SimpleNamespace(requests={})

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        if method == "steer_drop":
            for rank in self.ranks:
                rank.discard(args[0])
            return [{"ok": True}, {"ok": True}]
        self.ranks[0].add(args[0])
        return [{"ok": True}, {"ok": False, "reason": "MemoryError: "}]


def test_a_vector_that_one_rank_cannot_take_is_held_by_none() -> None:
    core = OneRankFails()
    reply = engine_core.steer_put(core, DIGEST, b"payload")
    assert reply == {"ok": False, "reason": "MemoryError: "}
    assert core.ranks == [set(), set()]
    assert not engine_core.steer_hold(core, DIGEST)
