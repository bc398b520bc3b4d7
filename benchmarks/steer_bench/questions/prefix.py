"""With a shared prefix of 1,000 tokens, what is the time to first token, and how much of the prompt is cached?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.load import Load, Steering
from steer_bench.mode import mode_of
from steer_bench.process import ArmProcess
from steer_bench.questions.serve import assert_armed
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave, middle
from steer_bench.settings import Settings
from steer_bench.timing import Timing

REQUESTS = 6
PLAIN = Load(
    num_requests=REQUESTS, concurrency=1, max_tokens=1, shared_prefix=1000, min_prompt=16, max_prompt=16
)  # fmt: skip
EQUAL = replace(PLAIN, steering=Steering.ADD)
GENERATION = replace(EQUAL, scope="generation")
DISTINCT = replace(EQUAL, num_vectors=REQUESTS)

SHARING: dict[str, tuple[Load, Load]] = {
    # The load that fills the cache, and the load that is timed.
    "unsteered": (PLAIN, PLAIN),
    "equal steering": (EQUAL, EQUAL),
    "`generation` scope, after unsteered traffic": (PLAIN, GENERATION),
}
NOT_SHARING = {"distinct steering": (PLAIN, DISTINCT)}
ROUNDS = 24
"""Rounds of the sharing cases: a round is short and the differences are small. The other case needs fewer."""


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    with ArmProcess("ours", settings if quick else settings.compiled()) as ours:
        assert_armed(ours)
        sharing, alone = (
            {name: partial(_after, ours, before, load) for name, (before, load) in cases.items()}
            for cases in (SHARING, NOT_SHARING)
        )
        interleave(sharing | alone, 1, progress, "prefix: warm-up")
        times = interleave(sharing, 3 if quick else ROUNDS, progress, "prefix")
        times |= interleave(alone, 3, progress, "prefix, not shared")
        rows = [
            {
                "case": name,
                "TTFT ms": round(middle([timing.ttft_ms for timing in timings]), 1),
                "cached share of the prompt": round(middle([_cached(timing) for timing in timings]), 4),
            }
            for name, timings in times.items()
        ]
        claims = []
        mode = mode_of(ours.facts, EQUAL)
        for name in ("equal steering", "`generation` scope, after unsteered traffic"):
            ratio = Ratio.of(
                [timing.ttft_ms for timing in times[name]], [timing.ttft_ms for timing in times["unsteered"]]
            )
            target = Target(at_most=1.05) if name == "equal steering" else None
            claims.append(Claim.of_ratio(f"TTFT on a shared prefix: {name} / unsteered", ratio, target, mode=mode))
        hits = Ratio.of(
            [_cached(timing) for timing in times["`generation` scope, after unsteered traffic"]],
            [_cached(timing) for timing in times["unsteered"]],
        )
        equal = Target(at_least=1.0)
        claims.append(Claim.of_ratio("cached share: `generation` scope / unsteered", hits, equal, mode=mode))
        return Answer(question="prefix", claims=claims, rows=rows, facts={"ours": ours.facts})


def _cached(timing: Timing) -> float:
    return timing.cached_tokens / timing.prompt_tokens


def _after(ours: ArmProcess, before: Load, load: Load, number: int) -> Timing:
    """Time `load` after one request of `before` on an empty cache."""
    assert ours.command("reset_prefix_cache")
    ours.run(replace(before, seed=number, num_requests=1))
    return ours.run(replace(load, seed=number))
