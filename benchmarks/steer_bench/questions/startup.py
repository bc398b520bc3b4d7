"""How much longer is the startup of an armed engine?"""

from __future__ import annotations

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.mode import engine_of
from steer_bench.process import ArmProcess
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import middle
from steer_bench.settings import Settings


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rounds = 2 if quick else 11
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    facts = {}
    task = progress.add_task("start-up", total=2 * rounds)
    for number in range(rounds):
        for name in ("stock", "ours") if number % 2 == 0 else ("ours", "stock"):
            with ArmProcess(name, Settings(**{**settings.to_json(), "num_vectors": 0})) as arm:
                seconds[name].append(arm.facts["start_up_s"])
                facts[name] = arm.facts
            progress.advance(task)
    rows = [
        {"case": name, "s": round(middle(took), 2), "min": round(min(took), 2), "max": round(max(took), 2)}
        for name, took in seconds.items()
    ]
    ratio = Ratio.of(seconds["ours"], seconds["stock"])
    mode = f"{engine_of(facts['ours'])}, all operations armed, imports included"
    claim = Claim.of_ratio("start-up, armed / stock", ratio, Target(at_most=1.05), mode=mode)
    return Answer(question="startup", claims=[claim], rows=rows, facts=facts)
