"""Does throughput fall with the number of distinct vectors among 256 concurrent requests?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.load import Load, Steering
from steer_bench.mode import mode_of
from steer_bench.process import ArmProcess
from steer_bench.questions.serve import assert_armed, check, figures, run
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave, throughputs
from steer_bench.settings import Settings

COUNTS = (1, 8, 32, 64, 128, 256)
REQUESTS = 256


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    with ArmProcess("ours", settings if quick else settings.compiled()) as ours:
        assert_armed(ours)
        plain = Load(num_requests=REQUESTS, concurrency=REQUESTS, max_tokens=8 if quick else 12, max_prompt=24)
        unsteered = ours.run(plain, check=True)
        cases = {}
        for count in (1, REQUESTS) if quick else COUNTS:
            load = replace(plain, steering=Steering.ADD, num_vectors=count)
            check(ours, load, plain=unsteered)
            cases[f"{count} distinct"] = partial(run, ours, load)
        times = interleave(cases, 3 if quick else 5, progress, "distinct")
        rows = [{"case": name, **figures(timings)} for name, timings in times.items()]
        ratio = Ratio.of(throughputs(times[f"{REQUESTS} distinct"]), throughputs(times["1 distinct"]))
        mode = mode_of(ours.facts, replace(plain, steering=Steering.ADD))
        claim = Claim.of_ratio(f"{REQUESTS} distinct vectors / 1", ratio, Target(at_least=0.95), mode=mode)
        return Answer(question="distinct", claims=[claim], rows=rows, facts={"ours": ours.facts})
