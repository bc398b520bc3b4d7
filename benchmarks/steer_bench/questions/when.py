"""Do triggers, conditions and schedules on every request cost throughput, compared with plain adds?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.load import Load, Steering
from steer_bench.mode import mode_of
from steer_bench.process import ArmProcess
from steer_bench.questions.serve import assert_armed, figures, run
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave, throughputs
from steer_bench.settings import Settings

SIZES = (32, 128)
KINDS = (Steering.TRIGGERS, Steering.CONDITIONS, Steering.SCHEDULES)
TARGET = Target(at_least=0.97)


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rows: list[dict[str, Any]] = []
    claims = []
    with ArmProcess("ours", settings if quick else settings.compiled()) as ours:
        assert_armed(ours)
        for size in SIZES:
            plain = Load(num_requests=size, concurrency=size, max_tokens=8 if quick else 24, num_vectors=size)
            loads = {kind.value: replace(plain, steering=kind) for kind in (Steering.ADD, *KINDS)}
            cases = {name: partial(run, ours, load) for name, load in loads.items()}
            for case in cases.values():  # warm up
                case(0)
            times = interleave(cases, 3 if quick else 9, progress, f"when, {size}")
            rows += [{"case": name, "at once": size, **figures(timings)} for name, timings in times.items()]
            for kind in KINDS:
                ratio = Ratio.of(throughputs(times[kind.value]), throughputs(times[Steering.ADD.value]))
                mode = mode_of(ours.facts, loads[kind.value])
                claims.append(Claim.of_ratio(f"{kind.value} / adds, {size} requests", ratio, TARGET, mode=mode))
        return Answer(question="when", claims=claims, rows=rows, facts={"ours": ours.facts})
