"""Profile an arm during a load with torch's profiler."""

from __future__ import annotations

from typing import Any

from steer_bench.load import Load

MATRICES = ("mm", "linear")
ATTENTION = ("attention",)
EDITS = "steer_engine::"
"""Prefix of our operators. Time in operators that they call counts as theirs."""


def profiled(arm: Any, load: Load) -> dict[str, float]:
    """Seconds of the load, and of its operators: matrix products, attention, our edits, and all others.

    The rest of the load's time is Python and the profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    arm.run(load)
    assert arm.command("reset_prefix_cache")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        timing = arm.run(load)
    seconds = dict.fromkeys(("matrix products", "attention", "edits", "other operators"), 0.0)
    for event in seen.key_averages():
        kind = _kind(event.key)
        took = event.cpu_time_total if kind == "edits" else event.self_cpu_time_total
        seconds[kind] += took / 1e6
    # Operators called by an edit were also counted under their own kind.
    inside = sum(
        event.self_cpu_time_total for event in seen.events() if _kind(event.name) != "edits" and _in_an_edit(event)
    )
    seconds["other operators"] -= inside / 1e6
    return {"all": timing.seconds, **seconds}


def _kind(name: str) -> str:
    if name.startswith(EDITS):
        return "edits"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "matrix products" if any(part in name for part in MATRICES) else "other operators"


def _in_an_edit(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(EDITS):
        parent = parent.cpu_parent
    return parent is not None
