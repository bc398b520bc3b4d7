"""Do triggers, conditions and schedules on every request cost throughput, compared with plain adds?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.load import Load, Steering
from steer_bench.process import ArmProcess
from steer_bench.questions.serve import assert_armed, compare
from steer_bench.ratio import Target
from steer_bench.settings import Settings

SIZES = (32, 128)
KINDS = (Steering.TRIGGERS, Steering.CONDITIONS, Steering.SCHEDULES)
TARGET = Target(at_least=0.97)


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    with ArmProcess("ours", settings if quick else settings.compiled()) as ours:
        assert_armed(ours)
        for size in SIZES:
            plain = Load(num_requests=size, concurrency=size, max_tokens=8 if quick else 24, num_vectors=size)
            adds = replace(plain, steering=Steering.ADD)
            loads = {"adds": adds, **{kind.value: replace(adds, steering=kind) for kind in KINDS}}
            targets = dict.fromkeys((kind.value for kind in KINDS), TARGET)
            compared = compare(ours, loads, targets, progress, rounds=3 if quick else 9)
            rows += compared[0]
            claims += compared[1]
        return Answer(question="when", claims=claims, rows=rows, facts={"ours": ours.facts})
