"""The op of each armed block runs exactly once in each of an engine's first real steps."""

from __future__ import annotations

import pytest
from helpers.stepping import new_runtime, route, stream

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.site_calls import SiteCalls
from steer_engine.errors import UnsupportedEngineError
from steer_engine.site import Site, points_at

BLOCKS = (2, 4, 7)
STEPS = 3


def counted(*, can_replay: bool = False) -> EngineRuntime:
    runtime = new_runtime(blocks=(0, 1, 2))
    runtime.count_calls(SiteCalls(BLOCKS, can_replay=can_replay, num_steps=STEPS))
    return runtime


def forward(runtime: EngineRuntime, *sites: int) -> None:
    for site in sites:
        runtime.edit(*stream(), site)


def step(runtime: EngineRuntime, *sites: int) -> None:
    route(runtime, (0, 0, 2))
    forward(runtime, *sites)
    runtime.end_step()


def test_a_site_that_runs_otherwise_names_its_flag() -> None:
    points = (*BLOCKS, *points_at(BLOCKS, Site.MLP))
    calls = SiteCalls(points, can_replay=False)
    calls.begin_step()
    for site in (0, 1, 2, 3, 3, 5):
        calls.count(site)
    with pytest.raises(UnsupportedEngineError) as caught:
        calls.end_step()
    assert "ran otherwise at: 2 (mlp) (2), 4 (mlp) (0)." in caught.value.message
    assert "Leave them out of --steering-blocks, or mlp out of --steering-sites" in caught.value.message
    calls = SiteCalls(BLOCKS, can_replay=False)
    calls.begin_step()
    with pytest.raises(UnsupportedEngineError) as caught:
        calls.end_step()
    assert "--steering-sites" not in caught.value.message


def test_counting_ends_after_the_first_steps() -> None:
    runtime = counted()
    counting = runtime.edit
    forward(runtime, 0, 1, 2)  # the profile run
    for _ in range(STEPS):
        assert runtime.edit is counting
        step(runtime, 0, 1, 2)
    assert not runtime.counts_calls
    assert runtime.edit == EngineRuntime.edit.__get__(runtime)
    step(runtime, 0)


@pytest.mark.parametrize(
    ("sites", "named"),
    [
        ((0, 2), r"4 \(0\)"),
        ((0, 1, 1, 2), r"4 \(2\)"),
        ((), r"2 \(0\), 4 \(0\), 7 \(0\)"),
        ((0, 1, 2) * 2, r"2 \(2\), 4 \(2\), 7 \(2\)"),
    ],
    ids=["a block that one kernel replaces", "a block that runs twice", "all in one kernel", "a loop"],
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_step_that_differs_is_an_error(sites: tuple[int, ...], named: str, after: int) -> None:
    """Monokernel: the blocks ran at startup, and a real step runs a kernel in their place."""
    runtime = counted()
    forward(runtime, 0, 1, 2)
    for _ in range(after):
        step(runtime, 0, 1, 2)
    with pytest.raises(UnsupportedEngineError, match=f"at: {named}"):
        step(runtime, *sites)


def test_a_stage_without_a_sampler_is_checked_by_its_next_step() -> None:
    runtime = counted()
    forward(runtime, 0, 1, 2)
    route(runtime, (0, 0, 2))
    forward(runtime, 0, 2)
    with pytest.raises(UnsupportedEngineError, match=r"4 \(0\)"):
        route(runtime, (0, 2, 1))


def test_a_dummy_run_between_steps_is_not_a_step() -> None:
    runtime = counted()
    step(runtime, 0, 1, 2)
    runtime.idle()
    forward(runtime, 0, 1, 2)
    step(runtime, 0, 1, 2)


def test_replayed_steps_were_counted_when_they_were_captured() -> None:
    runtime = counted(can_replay=True)
    forward(runtime, *(0, 1, 2) * 4)
    for _ in range(STEPS):
        step(runtime)
    captured_wrongly = counted(can_replay=True)
    forward(captured_wrongly, 0, 1, 2, 0, 2)
    with pytest.raises(UnsupportedEngineError, match=r"dummy runs .* 4 \(1\)"):
        step(captured_wrongly)
    never = counted(can_replay=True)
    with pytest.raises(UnsupportedEngineError, match=r"2 \(0\)"):
        step(never)
