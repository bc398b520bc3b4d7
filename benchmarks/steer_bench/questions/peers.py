"""How fast are other projects that steer each request with its own vector, on the same vLLM, model and load?

Every peer runs at the best of four batch sizes, chosen before the rounds. Steer Engine runs compiled, its default.
Plain vLLM runs the same load unsteered: its ratio to a peer is the upper bound for any way of steering on vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.environments import INTERP, LENS, Environment, python_of
from steer_bench.load import Load, Steering
from steer_bench.mode import mode_of
from steer_bench.process import ArmFailed, ArmProcess
from steer_bench.questions.serve import MOVED, assert_comparable, check, figures, run
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave, throughputs
from steer_bench.settings import Settings
from steer_bench.timing import Timing

OURS = "Steer Engine"
PLAIN = "plain vLLM, unsteered"
SHARES = (1, 2, 4, 8)
"""The batch sizes of the sweep are the load's concurrency divided by these."""
REQUESTS = {32: 32, 128: 128}
ROUNDS = {32: 5, 128: 3}


@dataclass(frozen=True, kw_only=True, eq=False)
class Peer:
    """A peer: its arm, environment (None = this one), and target ratios by concurrency."""

    title: str
    arm: str
    environment: Environment | None
    targets: dict[int, Target]

    def start(self, settings: Settings) -> ArmProcess:
        python = {} if self.environment is None else {"python": python_of(self.environment)}
        return ArmProcess(self.arm, settings, **python)

    def at(self, arm: ArmProcess, load: Load, batch: int) -> Callable[[int], Timing]:
        """A case that runs the load in batches of this size."""
        if self.arm != "hooks":
            return partial(run, arm, replace(load, concurrency=batch))

        def sized(number: int) -> Timing:
            arm.command("batch_size", value=batch)
            return run(arm, load, number)

        return sized


PEERS = (
    Peer(
        title="vllm-lens", arm="lens", environment=LENS,
        targets={32: Target(at_least=1.5), 128: Target(at_least=2.0)},
    ),
    Peer(title="interp-engine, hooked", arm="interp", environment=INTERP, targets={32: Target(at_least=1.3)}),
    Peer(title="Hugging Face + hooks", arm="hooks", environment=None, targets={32: Target(at_least=1.5)}),
)  # fmt: skip


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    with ExitStack() as stack:
        own = settings if quick else settings.compiled()
        ours, stock = (stack.enter_context(ArmProcess(name, own)) for name in ("ours", "stock"))
        assert_comparable(stock, ours)
        running, rows = _start_peers(stack, settings, ours.facts["threads"])
        claims: list[Claim] = []
        for concurrency in (32,) if quick else REQUESTS:
            load = Load(
                num_requests=REQUESTS[concurrency], concurrency=concurrency, max_tokens=16, min_prompt=8,
                max_prompt=96, steering=Steering.ADD, num_vectors=REQUESTS[concurrency],
            )  # fmt: skip
            _check_all(ours, running, load)
            best = {peer: _best(peer, arm, load, progress, rows) for peer, arm in running.items()}
            unsteered = replace(load, steering=Steering.NONE)
            cases: dict[str, Callable[[int], Timing]] = {
                OURS: partial(run, ours, load),
                PLAIN: partial(run, stock, unsteered),
            }
            cases |= {peer.title: peer.at(arm, load, best[peer]) for peer, arm in running.items()}
            rounds = 2 if quick else ROUNDS[concurrency]
            times = interleave(cases, rounds, progress, f"peers: {concurrency} at once")
            for name, timings in times.items():
                rows.append({"case": name, "part": f"rounds, {concurrency} at once", **figures(timings)})
            mode = f"{mode_of(ours.facts, load)}, peers eager, ragged prompts, distinct vectors, {settings.dtype}"
            for peer, arm in running.items():
                outside = arm.facts.get("outside_supported", "")
                for name, target in ((OURS, peer.targets.get(concurrency)), (PLAIN, None)):
                    ratio = Ratio.of(throughputs(times[name]), throughputs(times[peer.title]))
                    claims.append(Claim.of_ratio(f"{name} / {peer.title}", ratio, target, mode=mode, note=outside))
        facts = {OURS: ours.facts, PLAIN: stock.facts, **{peer.title: arm.facts for peer, arm in running.items()}}
        return Answer(question="peers", claims=claims, rows=rows, facts=facts)


def _start_peers(
    stack: ExitStack, settings: Settings, threads: int
) -> tuple[dict[Peer, ArmProcess], list[dict[str, Any]]]:
    """Returns the running peers, and a table row with the reason for each that cannot run."""
    running, rows = {}, []
    for peer in PEERS:
        try:
            arm = stack.enter_context(peer.start(settings))
            assert arm.facts["dtype"] == settings.dtype
            if peer.arm == "hooks":
                arm.command("threads", value=threads)
            else:
                assert arm.facts["threads"] == threads
            running[peer] = arm
        except ArmFailed as failed:
            rows.append({"case": peer.title, "part": "cannot run", "reason": str(failed)[-300:]})
    return running, rows


def _check_all(ours: ArmProcess, running: dict[Peer, ArmProcess], load: Load) -> None:
    """Assert that steering changes every prompt's log-probability. Record how much each peer differs from ours."""
    plain = ours.run(replace(load, steering=Steering.NONE), check=True)
    check(ours, load, plain=plain)
    mine = ours.run(load, check=True).prompt_logprobs
    for arm in running.values():
        theirs = arm.run(load, check=True).prompt_logprobs
        apart = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        moved = min(abs(a - b) for a, b in zip(mine, plain.prompt_logprobs, strict=True))
        assert moved > MOVED
        # Recorded, so that readers see if a peer computes something else.
        arm.facts["largest difference of a prompt's mean log-probability"] = apart


def _best(peer: Peer, arm: ArmProcess, load: Load, progress: Progress, rows: list[dict[str, Any]]) -> int:
    """The batch size with the highest throughput in one run each. Appends a table row per size."""
    sizes = [load.concurrency // share for share in SHARES]
    rates = {}
    task = progress.add_task(f"peers: {peer.title}, batch size for {load.concurrency}", total=len(sizes))
    for size in sizes:
        timing = peer.at(arm, load, size)(99)
        rates[size] = timing.tokens_per_second
        part = f"sweep, {load.concurrency} at once"
        rows.append({"case": f"{peer.title}, batches of {size}", "part": part, "tok/s": round(rates[size], 1)})
        progress.advance(task)
    return max(rates, key=lambda size: rates[size])
