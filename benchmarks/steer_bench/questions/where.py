"""Where does the time of a load go, in plain vLLM, in ours, and in the peers that steer by hooks?

Eager, since a compiled graph is one operator to the profiler, and under the profiler, so that only shares are meant.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer
from steer_bench.environments import INTERP, LENS, python_of
from steer_bench.load import Load, Steering
from steer_bench.process import ArmFailed, ArmProcess
from steer_bench.settings import Settings

PLAIN = Load(num_requests=32, concurrency=32, max_tokens=16, min_prompt=8, max_prompt=96, num_vectors=32)
ADD, DIRECTIONAL = replace(PLAIN, steering=Steering.ADD), replace(PLAIN, steering=Steering.DIRECTIONAL)
CASES = {
    "stock": {"plain vLLM": PLAIN},
    "ours": {"armed, idle": PLAIN, "distinct vectors": ADD, "directional, distinct": DIRECTIONAL},
    "lens": {"vllm-lens": ADD},
    "interp": {"interp-engine, hooked": ADD},
}
ENVIRONMENTS = {"lens": LENS, "interp": INTERP}


def ask(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rows: list[dict[str, Any]] = []
    facts = {}
    task = progress.add_task("where", total=sum(map(len, CASES.values())))
    for name, loads in CASES.items():
        if quick and name in ENVIRONMENTS:
            continue
        try:
            with ExitStack() as stack:
                python = {"python": python_of(ENVIRONMENTS[name])} if name in ENVIRONMENTS else {}
                arm = stack.enter_context(ArmProcess(name, settings, **python))
                facts[name] = arm.facts
                for case, load in loads.items():
                    rows.append({"case": case, **_row(arm.profile(load))})
                    progress.advance(task)
        except ArmFailed as failed:
            rows.append({"case": name, "reason": str(failed)[-300:]})
    return Answer(question="where", claims=[], rows=rows, facts=facts)


def _row(seconds: dict[str, float]) -> dict[str, float]:
    rest = 2 * seconds["all"] - sum(seconds.values())
    return {f"{name}, s": round(value, 3) for name, value in {**seconds, "the rest": rest}.items()}
