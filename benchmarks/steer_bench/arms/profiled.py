"""What an arm's process does while it answers a load, as torch's profiler sees it."""

from __future__ import annotations

from typing import Any

from steer_bench.load import Load

MATRICES = ("mm", "linear")
ATTENTION = ("attention",)
EDITS = "steer_engine::"
"""Our operators. What they call in turn counts as theirs."""


def profiled(arm: Any, load: Load) -> dict[str, float]:
    """Seconds of the load, and of the operators in it: matrix products, attention, our edits, and all others.

    What is left of the load is Python and the profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    arm.run(load)
    assert arm.ask("reset_prefix_cache")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        timing = arm.run(load)
    seconds = dict.fromkeys(("matrix products", "attention", "edits", "other operators"), 0.0)
    for event in seen.key_averages():
        kind = _kind(event.key)
        took = event.cpu_time_total if kind == "edits" else event.self_cpu_time_total
        seconds[kind] += took / 1e6
    # The parts of an edit were counted among the others as well.
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
