"""Vectors reach the engine before the requests that need them, even if other processes made the engine drop them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering, tokens
from helpers.engines import random_vector

from steer_engine import LLM, __version__
from steer_engine.api.answers import status_of
from steer_engine.api.frontend import FRESH_SECONDS, ShippedVectors
from steer_engine.errors import CapacityError, UnsupportedEngineError
from steer_engine.vllm import engine_client, engine_core

PROMPT = tokens(0, 12)
SPEC = steering(edit("r9", 2.0))
DIGEST = random_vector(9).digest

pytestmark = pytest.mark.v1_only  # the runner has no part in it


@pytest.fixture
def clock(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of this API process, which begins with no vector shipped."""
    now = [0.0]
    monkeypatch.setattr(tiny._frontend, "shipped", ShippedVectors(lambda: now[0]))
    return now


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the actions that the engine core runs."""
    found: list[str] = []
    original = engine_client.call

    def call(llm_engine: Any, action: str, *args: Any) -> Any:
        found.append(action)
        return original(llm_engine, action, *args)

    monkeypatch.setattr(engine_client, "call", call)
    return found


def answer(llm: LLM, spec: Any = SPEC) -> tuple[list[int], list[float]]:
    return sampled(generate(llm, [PROMPT], [spec])[0])


def test_a_vector_is_sent_once_and_confirmed_later(tiny: LLM, clock: list[float], calls: list[str]) -> None:
    first = answer(tiny)
    assert calls == ["put"]
    assert answer(tiny) == first
    assert calls == ["put"]
    clock[0] += FRESH_SECONDS
    assert answer(tiny) == first
    assert calls == ["put", "hold"]


def test_a_vector_that_the_engine_dropped_is_sent_again(tiny: LLM, clock: list[float], calls: list[str]) -> None:
    first = answer(tiny)
    assert engine_client.call(tiny.llm_engine, "drop", DIGEST) == {"ok": True}
    clock[0] += FRESH_SECONDS
    calls.clear()
    assert answer(tiny) == first != answer(tiny, None)
    assert calls == ["hold", "put"]
    assert DIGEST in tiny.steering_status()["vectors"]


def worker(*stage: int, requested: tuple[int, ...] = (0, 1, 2, 3), **differs: Any) -> dict[str, Any]:
    """The status of a worker with these blocks."""
    armed = [block for block in requested if block in stage]
    common = dict.fromkeys(("sites", "ops", "rows", "hidden_size", "dtype"), 1)
    forms = {str(block): "split" for block in armed}
    common["probe_limits"], common["monitors"] = [8, 256], []
    own = {"version": __version__, "stage_blocks": list(stage), "asked_blocks": list(requested), "armed_blocks": armed}
    return {**common, **own, "forms": forms, **differs}


def status(*workers: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True, "workers": list(workers), "vectors": [], "ended_non_finite": 1}


WHOLE = worker(0, 1, 2, 3)
FIRST, SECOND = worker(0, 1), worker(2, 3)


@pytest.mark.parametrize("workers", [(WHOLE,), (WHOLE, WHOLE), (FIRST, SECOND), (FIRST, FIRST, SECOND, SECOND)])
def test_statuses_of_several_engines_are_one(workers: tuple[dict[str, Any], ...]) -> None:
    merged = engine_client.check_status([status(*workers), status(*workers)])
    assert [each["engine"] for each in merged["workers"]] == [0] * len(workers) + [1] * len(workers)
    assert merged["ended_non_finite"] == 2


def test_a_stage_may_have_no_armed_block() -> None:
    few = [worker(0, 1, requested=(2,)), worker(2, 3, requested=(2,))]
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
        ((FIRST, worker(2, 3, requested=(3,))), "differ in asked_blocks"),
        ((FIRST, worker(2, 3, rows=2)), "differ in rows"),
        ((FIRST, worker(2, 3, probe_limits=[4, 256])), "MAX_PROBES"),
        ((FIRST, worker(2, 3, version="0")), "runs steer-engine 0"),
    ],
)
def test_workers_that_are_armed_differently_are_refused(workers: tuple[dict[str, Any], ...], why: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=why):
        engine_client.check_status([status(WHOLE), status(*workers)])


class Stages:
    """An engine core of two stages with two ranks each, for `fetch_capture` as a plain function."""

    def __init__(self, *replies: dict[str, Any]) -> None:
        self.replies = list(replies)

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        assert (method, args[0]) == ("steer", "fetch_capture")
        return self.replies


def captured(*points: int, positions: tuple[int, ...] = (4, 5)) -> dict[str, Any]:
    rows_LPD = (
        np.stack([np.full((len(positions), 2), point, np.float32) for point in points]) if points else np.empty(0)
    )
    return {"ok": True, "points": list(points), "positions": list(positions), "shape": list(rows_LPD.shape),
            "rows": rows_LPD.tobytes()}  # fmt: skip


def test_captured_rows_of_stages_are_joined_in_the_order_of_points() -> None:
    taken = engine_core.fetch_capture(
        Stages(captured(0, 1), captured(0, 1), captured(2, 10), captured(2, 10), captured(positions=())), "key"
    )
    assert (taken["positions"], taken["shape"]) == ([4, 5], [4, 2, 2])
    rows_LPD = np.frombuffer(taken["rows"], np.float32).reshape(taken["shape"])
    assert rows_LPD[:, 0, 0].tolist() == [0, 1, 2, 10]
    assert engine_core.fetch_capture(Stages(captured(0), {"ok": False, "reason": "why"}), "key")["reason"] == "why"
    assert not engine_core.fetch_capture(Stages(captured(0), captured(1, positions=(4,))), "key")["ok"]


@pytest.mark.parametrize("shipped_before", [False, True])
async def test_an_engine_that_cannot_take_a_vector_is_a_503(
    tiny: LLM, clock: list[float], shipped_before: bool
) -> None:
    """One of two engines of a server has no room. Nothing is believed to be shipped afterwards."""
    replies = {
        "hold": [False, False],
        "put": [{"ok": True, "dropped": []}, {"ok": False, "reason": "the store is full"}],
    }
    frontend = tiny._frontend
    resolved = frontend.resolve(SPEC)
    assert resolved is not None
    if shipped_before:
        frontend.shipped.confirm(DIGEST, -FRESH_SECONDS)

    async def call_utility_all_async(name: str, action: str, args: list[Any]) -> list[Any]:
        return replies[action]

    core = SimpleNamespace(call_utility_all_async=call_utility_all_async)
    server = SimpleNamespace(engine_core=core, input_processor=SimpleNamespace(steering=frontend))
    with pytest.raises(CapacityError, match="could not take vector sha256:[0-9a-f]{64}: the store is full") as caught:
        await engine_client.ship(server, resolved)
    assert status_of(caught.value) == 503
    assert caught.value.retry_after >= 1
    assert DIGEST not in frontend.shipped


class OneRankFails:
    """An engine core of two ranks, the second of which has no memory left; for `put` as a plain function."""

    def __init__(self) -> None:
        self.ranks: list[set[str]] = [set(), set()]
        self.scheduler = SimpleNamespace(requests={})

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        assert method == "steer"
        action, digest, *_ = args
        if action == "drop":
            for rank in self.ranks:
                rank.discard(digest)
            return [{"ok": True}, {"ok": True}]
        self.ranks[0].add(digest)
        return [{"ok": True}, {"ok": False, "reason": "MemoryError: "}]


def test_a_vector_that_one_rank_cannot_store_is_stored_by_none() -> None:
    core = OneRankFails()
    reply = engine_core.put(core, DIGEST, b"payload")
    assert reply == {"ok": False, "reason": "MemoryError: "}
    assert core.ranks == [set(), set()]
    assert not engine_core.hold(core, DIGEST)
