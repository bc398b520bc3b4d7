"""Vectors reach the engine before the requests that need them, also where others make room there meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering, tokens
from helpers.engines import random_vector

from steer_engine import LLM, __version__
from steer_engine.api.frontend import FRESH_SECONDS, Held
from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm import engine_client, engine_core

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
    original = engine_client.call

    def call(llm_engine: Any, method: str, *args: Any) -> Any:
        found.append(method)
        return original(llm_engine, method, *args)

    monkeypatch.setattr(engine_client, "call", call)
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
    assert engine_client.call(tiny.llm_engine, "steer_drop", DIGEST) == {"ok": True}
    clock[0] += FRESH_SECONDS
    calls.clear()
    assert answer(tiny) == first != answer(tiny, None)
    assert calls == ["steer_hold", "steer_put"]
    assert DIGEST in tiny.steering_status()["vectors"]


def worker(*stage: int, asked: tuple[int, ...] = (0, 1, 2, 3), **differs: Any) -> dict[str, Any]:
    """What a worker with these blocks says of itself."""
    armed = [block for block in asked if block in stage]
    alike = dict.fromkeys(("ops", "rows", "hidden_size", "dtype"), 1)
    forms = {str(block): "split" for block in armed}
    said = {"version": __version__, "stage_blocks": list(stage), "asked_blocks": list(asked), "armed_blocks": armed}
    return {**alike, **said, "forms": forms, **differs}


def status(*workers: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True, "workers": list(workers), "vectors": []}


WHOLE = worker(0, 1, 2, 3)
FIRST, SECOND = worker(0, 1), worker(2, 3)


@pytest.mark.parametrize("workers", [(WHOLE,), (WHOLE, WHOLE), (FIRST, SECOND), (FIRST, FIRST, SECOND, SECOND)])
def test_statuses_of_several_engines_are_one(workers: tuple[dict[str, Any], ...]) -> None:
    merged = engine_client.check_status([status(*workers), status(*workers)])
    assert [each["engine"] for each in merged["workers"]] == [0] * len(workers) + [1] * len(workers)


def test_a_stage_may_have_no_armed_block() -> None:
    few = [worker(0, 1, asked=(2,)), worker(2, 3, asked=(2,))]
    assert few[0]["armed_blocks"] == []
    engine_client.check_status([status(*few)])


@pytest.mark.parametrize(
    ("workers", "why"),
    [
        ((FIRST,), r"No worker has blocks \[2, 3\]"),
        ((FIRST, FIRST), "No worker has blocks"),
        ((WHOLE, worker(0, 1, 2, 3, armed_blocks=[0, 1, 2])), "should arm"),
        ((FIRST, worker(2, 3, armed_blocks=[])), "should arm"),
        ((WHOLE, worker(0, 1, 2, 3, forms={"0": "one"})), "differ in forms"),
        ((FIRST, worker(2, 3, asked=(3,))), "differ in asked_blocks"),
        ((FIRST, worker(2, 3, rows=2)), "differ in rows"),
        ((FIRST, worker(2, 3, version="0")), "runs steer-engine 0"),
    ],
)
def test_workers_that_are_not_armed_between_them_are_refused(workers: tuple[dict[str, Any], ...], why: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=why):
        engine_client.check_status([status(WHOLE), status(*workers)])


class Stages:
    """An engine core of two stages with two ranks each, for `steer_take` as a plain function."""

    def __init__(self, *replies: dict[str, Any]) -> None:
        self.replies = list(replies)

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        return self.replies


def read(*blocks: int, positions: tuple[int, ...] = (4, 5)) -> dict[str, Any]:
    rows_LPD = (
        np.stack([np.full((len(positions), 2), block, np.float32) for block in blocks]) if blocks else np.empty(0)
    )
    return {"ok": True, "blocks": list(blocks), "positions": list(positions), "shape": list(rows_LPD.shape),
            "rows": rows_LPD.tobytes()}  # fmt: skip


def test_what_stages_have_read_is_put_together_in_the_order_of_blocks() -> None:
    taken = engine_core.steer_take(Stages(read(0, 1), read(0, 1), read(2, 10), read(2, 10), read(positions=())), "key")
    assert (taken["blocks"], taken["positions"], taken["shape"]) == ([0, 1, 2, 10], [4, 5], [4, 2, 2])
    rows_LPD = np.frombuffer(taken["rows"], np.float32).reshape(taken["shape"])
    assert rows_LPD[:, 0, 0].tolist() == [0, 1, 2, 10]
    assert engine_core.steer_take(Stages(read(0), {"ok": False, "reason": "why"}), "key")["reason"] == "why"
    assert not engine_core.steer_take(Stages(read(0), read(1, positions=(4,))), "key")["ok"]


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
