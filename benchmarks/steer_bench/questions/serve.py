"""What does steering cost in throughput, time to first token and inter-token latency, compared with plain vLLM?

Plain vLLM and an engine armed for all operations at all blocks alternate on the same random prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.load import Load, Steering
from steer_bench.mode import mode_of
from steer_bench.process import ArmProcess
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave, middle, throughputs
from steer_bench.settings import Settings
from steer_bench.timing import Timing

IDLE, ONE, DISTINCT, HALF, DIRECTIONAL = (
    "armed, idle", "one vector", "distinct vectors", "half of them steered", "directional, distinct",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One engine setting at one concurrency."""

    eager: bool
    concurrency: int
    num_requests: int
    max_tokens: int
    rounds: int

    def __str__(self) -> str:
        return f"{'eager' if self.eager else 'compiled'}, {self.concurrency} at once"

    @property
    def plain(self) -> Load:
        return Load(num_requests=self.num_requests, concurrency=self.concurrency, max_tokens=self.max_tokens)


COMPILED = (
    Mode(eager=False, concurrency=1, num_requests=2, max_tokens=32, rounds=12),
    Mode(eager=False, concurrency=32, num_requests=32, max_tokens=24, rounds=12),
    Mode(eager=False, concurrency=128, num_requests=128, max_tokens=12, rounds=9),
)
EAGER = (Mode(eager=True, concurrency=32, num_requests=32, max_tokens=24, rounds=8),)
QUICK = Mode(eager=True, concurrency=32, num_requests=32, max_tokens=12, rounds=5)

TARGETS = {
    (IDLE, 1): Target(at_least=0.99),
    (IDLE, 32): Target(at_least=0.99),
    (IDLE, 128): Target(at_least=0.99),
    (DISTINCT, 32): Target(at_least=0.97),
    (DIRECTIONAL, 32): Target(at_least=0.90),
}
"""Targets of compiled engines, by case and concurrency."""

MOVED = 1e-4
"""Nats. Without steering, the mean log-probability of a prompt differs by about 1e-6 between two float32 engines."""


def loads(plain: Load) -> dict[str, Load]:
    """The loads of the armed engine, by case."""
    steered = replace(plain, steering=Steering.ADD)
    distinct = replace(steered, num_vectors=plain.num_requests)
    return {
        IDLE: plain,
        ONE: steered,
        DISTINCT: distinct,
        HALF: replace(distinct, every=2),
        DIRECTIONAL: replace(distinct, steering=Steering.DIRECTIONAL),
    }


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    if quick:
        return _against_idle(settings, progress)
    answers = [_modes(settings.compiled(), COMPILED, progress), _modes(settings, EAGER, progress)]
    return Answer(
        question="serve",
        claims=[claim for answer in answers for claim in answer.claims],
        rows=[row for answer in answers for row in answer.rows],
        facts={"compiled": answers[0].facts, "eager": answers[1].facts},
    )


def _modes(settings: Settings, modes: tuple[Mode, ...], progress: Progress) -> Answer:
    claims, rows = [], []
    with ArmProcess("stock", settings) as stock, ArmProcess("ours", settings) as ours:
        assert_comparable(stock, ours)
        for mode in modes:
            assert mode.eager == settings.eager
            cases = {"stock": partial(run, stock, mode.plain)}
            plain = stock.run(mode.plain, check=True)
            loads_by_case = loads(mode.plain)
            for name, load in loads_by_case.items():
                check(ours, load, plain=plain)
                cases[name] = partial(run, ours, load)
            times = interleave(cases, mode.rounds, progress, f"serve: {mode}")
            for name, timings in times.items():
                row = {"mode": str(mode), "case": name, **figures(timings)}
                if name != "stock":
                    ratio = Ratio.of(throughputs(timings), throughputs(times["stock"]))
                    row["ratio"] = str(ratio)
                    target = None if mode.eager else TARGETS.get((name, mode.concurrency))
                    claims.append(
                        Claim.of_ratio(f"{name} / stock", ratio, target, mode=mode_of(ours.facts, loads_by_case[name]))
                    )
                rows.append(row)
        return Answer(question="serve", claims=claims, rows=rows, facts={"stock": stock.facts, "ours": ours.facts})


def _against_idle(settings: Settings, progress: Progress) -> Answer:
    """The quick variant: steered compared with idle on one eager engine."""
    mode = QUICK
    with ArmProcess("ours", settings) as ours:
        loads_by_case = loads(mode.plain)
        plain = ours.run(mode.plain, check=True)
        for load in loads_by_case.values():
            check(ours, load, plain=plain)
        cases = {name: partial(run, ours, load) for name, load in loads_by_case.items()}
        times = interleave(cases, mode.rounds, progress, f"serve: {mode}")
        claims, rows = [], []
        for name, timings in times.items():
            rows.append({"mode": str(mode), "case": name, **figures(timings)})
            if name != IDLE:
                ratio = Ratio.of(throughputs(timings), throughputs(times[IDLE]))
                rows[-1]["ratio"] = str(ratio)
                claims.append(Claim.of_ratio(f"{name} / idle", ratio, mode=mode_of(ours.facts, loads_by_case[name])))
        return Answer(question="serve", claims=claims, rows=rows, facts={"ours": ours.facts})


def compare(
    ours: ArmProcess,
    loads: Mapping[str, Load],
    targets: Mapping[str, Target | None],
    progress: Progress,
    *,
    rounds: int,
) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Throughput of loads of one engine, compared with the first of them.

    targets: load -> target of its ratio. A load that is missing there is shown in the rows only.
    """
    cases = {name: partial(run, ours, load) for name, load in loads.items()}
    for case in cases.values():  # warm up
        case(0)
    base, size = next(iter(loads)), next(iter(loads.values())).concurrency
    times = interleave(cases, rounds, progress, f"{base}, {size}")
    rows, claims = [], []
    for name, timings in times.items():
        ratio = Ratio.of(throughputs(timings), throughputs(times[base]))
        rows.append({"case": name, "at once": size, **figures(timings), "ratio": "" if name == base else str(ratio)})
        if name in targets:
            mode = mode_of(ours.facts, loads[name])
            claims.append(Claim.of_ratio(f"{name} / {base}, {size} requests", ratio, targets[name], mode=mode))
    return rows, claims


def run(arm: ArmProcess, load: Load, number: int) -> Timing:
    """Run one round with an empty prefix cache. All cases of a round use the same prompts."""
    assert arm.command("reset_prefix_cache")
    timing = arm.run(replace(load, seed=1 + number))
    assert timing.cached_tokens == 0
    return timing


def figures(timings: list[Timing]) -> dict[str, float]:
    """Medians over the rounds."""
    rates = throughputs(timings)
    return {
        "tok/s": round(middle(rates), 1),
        "tok/s min": round(min(rates), 1),
        "tok/s max": round(max(rates), 1),
        "TTFT ms": round(middle([timing.ttft_ms for timing in timings]), 1),
        "ITL ms": round(middle([timing.itl_ms for timing in timings]), 2),
    }


def assert_comparable(stock: ArmProcess, ours: ArmProcess) -> None:
    """Assert that the first engine is plain vLLM, the second is armed, and both have the same settings."""
    assert not stock.facts["steer_engine"]
    for fact in ("vllm", "runner", "eager", "dtype", "threads"):
        assert stock.facts[fact] == ours.facts[fact], f"{fact}: {stock.facts[fact]} against {ours.facts[fact]}"
    assert_armed(ours)


def assert_armed(ours: ArmProcess) -> None:
    assert ours.facts["armed_blocks"] == list(range(ours.facts["num_blocks"]))
    assert ours.facts["ops"] == ours.facts["all_ops"]


def check(ours: ArmProcess, load: Load, *, plain: Timing) -> None:
    """Run once without timing. Assert that the engine applies the requested digests and that steering has an effect.

    plain: the checked run of the same prompts without steering.
    """
    timing = ours.run(load, check=True)
    expected = ours.command("digests", num_vectors=min(load.num_vectors, load.num_steered))
    if load.num_requests <= load.concurrency:
        assert timing.applied["steered"] == timing.applied["steered_slots"] == load.num_steered, timing.applied
        assert timing.applied["digests"] == sorted(expected)
    else:
        assert set(timing.applied["digests"]) <= set(expected)
    for request, (mine, theirs) in enumerate(zip(timing.prompt_logprobs, plain.prompt_logprobs, strict=True)):
        moved, steered = abs(mine - theirs), load.vector_of(request) is not None
        assert (moved > MOVED) if steered else (moved < MOVED), f"Request {request} of {load} moved by {moved:.2e}."
