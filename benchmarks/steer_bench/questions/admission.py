"""How much host time does steering add per request and per step?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.load import Load, Steering
from steer_bench.mode import mode_of
from steer_bench.process import ArmProcess
from steer_bench.questions.serve import assert_armed
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import middle
from steer_bench.settings import Settings

TARGET_US = Target(at_most=150.0)
CONCURRENCY = 128


KINDS = {
    "idle": Steering.NONE, "distinct vectors": Steering.ADD, "directional": Steering.DIRECTIONAL,
    "triggers": Steering.TRIGGERS, "conditions": Steering.CONDITIONS, "schedules": Steering.SCHEDULES,
}  # fmt: skip

SUBMITTED = {"named": "a named", "inline": "an inline"}
"""Kinds of vector in a submitted request."""


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rounds = 2 if quick else 7
    steered = Load(num_requests=CONCURRENCY, concurrency=CONCURRENCY, max_tokens=8, num_vectors=CONCURRENCY)
    with ArmProcess("ours", settings if quick else settings.compiled()) as ours:
        assert_armed(ours)
        rows: list[dict[str, Any]] = []
        claims = []
        sizes = (CONCURRENCY,) if quick else (1, 32, CONCURRENCY)
        task = progress.add_task("admission", total=len(sizes) * len(KINDS))
        for size in sizes:
            for kind, steering in KINDS.items():
                load = replace(steered, num_requests=size, concurrency=size, num_vectors=size, steering=steering)
                ours.run(load)
                measured = [ours.command("host_time", load=replace(load, seed=1 + r).to_json()) for r in range(rounds)]
                rows.append({"case": kind, **_middle(measured)})
                progress.advance(task)
                if size == CONCURRENCY:
                    steps = [one["decode_step_us"] for one in measured]
                    claims.append(_claim(kind, steps, mode_of(ours.facts, load)))
        registering = [ours.command("register", number=100_000 + number) for number in range(5 if quick else 20)]
        rows.append({"case": "registering a vector of all blocks", "us": round(1e6 * middle(registering), 1)})
        rows += submitting_rows(ours.command("submitting", num_requests=32 if quick else 256))
        return Answer(question="admission", claims=claims, rows=rows, facts={"ours": ours.facts})


def submitting_rows(median_us: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows for the time of `add_request`, and for what each kind of vector adds to that of an unsteered request."""
    plain = median_us["unsteered"]
    times = {f"submitting a request, {kind}": us for kind, us in median_us.items()}
    added = {f"added by {what} vector": median_us[kind] - plain for kind, what in SUBMITTED.items()}
    return [{"case": case, "us": round(us, 1)} for case, us in (times | added).items()]


def _claim(kind: str, steps_us: list[float], mode: str) -> Claim:
    interval = Ratio.of(steps_us, [1.0] * len(steps_us))
    return Claim(
        what=f"host time added to a decoding step, {kind}", mode=mode, unit="µs", value=interval.median,
        low=interval.low, high=interval.high, target=str(TARGET_US),
        verdict=TARGET_US.verdict(interval.low, interval.high),
    )  # fmt: skip


def _middle(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds, of the values that every round has."""
    keys = [key for key in measured[0] if all(one[key] is not None for one in measured)]
    return {key: round(middle([one[key] for one in measured]), 1) for key in keys}
