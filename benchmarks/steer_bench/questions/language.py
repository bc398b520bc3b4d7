"""What do probes and the operations with several rows cost, compared with the same requests without them?

Probes read at one block or at all; features, low-rank edits and rotations at one block are compared with adds there.
"""

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

SIZE = 32
NUM_VECTORS = 8
PROBED = Target(at_least=0.98)
RANKS = Target(at_least=0.97)


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    with ArmProcess("ours", settings if quick else settings.compiled()) as ours:
        assert_armed(ours)
        middle = ours.facts["num_blocks"] // 2
        plain = Load(num_requests=SIZE, concurrency=SIZE, max_tokens=12 if quick else 24, num_vectors=NUM_VECTORS)
        for loads, targets in (_probes(plain, middle), _operations(plain, middle)):
            compared = compare(ours, loads, targets, progress, rounds=5 if quick else 12)
            rows += compared[0]
            claims += compared[1]
        return Answer(question="language", claims=claims, rows=rows, facts={"ours": ours.facts})


Cases = tuple[dict[str, Load], dict[str, Target | None]]


def _probes(plain: Load, block: int) -> Cases:
    probed = replace(plain, steering=Steering.PROBES)
    one, everywhere = "4 probes at one block", "4 probes at all blocks"
    loads = {"unsteered": plain, one: replace(probed, probe_blocks=block), everywhere: probed}
    return loads, {one: PROBED, everywhere: None}


def _operations(plain: Load, block: int) -> Cases:
    """Adds at one block, and what else may happen there."""
    adds = replace(plain, steering=Steering.ADD, blocks=block, probe_blocks=block)
    kinds = (Steering.PROBED_ADDS, Steering.FEATURES, Steering.RANKS, Steering.ROTATIONS)
    loads = {"adds at one block": adds, **{kind.value: replace(adds, steering=kind) for kind in kinds}}
    targets = {
        Steering.PROBED_ADDS.value: PROBED, Steering.RANKS.value: RANKS,
        Steering.FEATURES.value: None, Steering.ROTATIONS.value: None,
    }  # fmt: skip
    return loads, targets
