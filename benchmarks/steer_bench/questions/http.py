"""What does steering cost over HTTP, measured by vLLM's own serving benchmark?"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.arms.ours import ADD_SCALE
from steer_bench.load import Load, Steering, vector
from steer_bench.mode import mode_of
from steer_bench.process import ArmProcess
from steer_bench.questions.serve import figures
from steer_bench.ratio import Ratio
from steer_bench.rounds import interleave, throughputs
from steer_bench.server import Server
from steer_bench.settings import Settings
from steer_bench.timing import Timing

LOADS = {
    1: Load(num_requests=3, concurrency=1, max_tokens=24, min_prompt=32, max_prompt=32),
    32: Load(num_requests=48, concurrency=32, max_tokens=16, min_prompt=32, max_prompt=32),
}
ROUNDS = {1: 9, 32: 7}
STEERING = {"steering": {"edits": [{"vector": "v0", "scale": ADD_SCALE}]}}


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    settings = replace(settings if quick else settings.compiled(), max_num_seqs=64)
    with tempfile.TemporaryDirectory() as folder, Server("stock", settings) as stock:
        digest = _register(Path(folder), settings)
        with Server("ours", settings, vectors=Path(folder)) as ours, ArmProcess("client", settings) as client:
            stock.wait()
            ours.wait()
            engine = _check(stock, ours, digest)
            facts = {"eager": settings.eager, **engine}
            claims, rows = [], []
            for concurrency, load in LOADS.items():
                cases = {
                    "stock": partial(_bench, client, stock, load, {}),
                    "armed, idle": partial(_bench, client, ours, load, {}),
                    "one vector": partial(_bench, client, ours, load, STEERING),
                }
                title = f"http: {concurrency} at once"
                interleave(cases, 1, progress, f"{title}: warm-up")
                times = interleave(cases, 2 if quick else ROUNDS[concurrency], progress, title)
                for name, timings in times.items():
                    rows.append({"mode": f"{concurrency} at once", "case": name, **figures(timings)})
                    if name != "stock":
                        ratio = Ratio.of(throughputs(timings), throughputs(times["stock"]))
                        rows[-1]["ratio"] = str(ratio)
                        case_load = load if name == "armed, idle" else replace(load, steering=Steering.ADD)
                        mode = f"HTTP, {mode_of(facts, case_load)}"
                        claims.append(Claim.of_ratio(f"{name} / stock", ratio, mode=mode))
            return Answer(question="http", claims=claims, rows=rows, facts={"client": client.facts, "ours": facts})


def _register(folder: Path, settings: Settings) -> str:
    """Save vector `v0` in the vectors folder. Returns its digest."""
    from transformers import AutoConfig

    from steer_engine import ControlVector
    from steer_engine.vectors import safetensors_format

    config: Any = AutoConfig.from_pretrained(settings.model)
    rows_LD = vector(0, config.num_hidden_layers, config.hidden_size)
    made = ControlVector(directions=dict(enumerate(rows_LD)))
    safetensors_format.save(made, folder / "v0.safetensors")
    return made.digest


def _check(stock: Server, ours: Server, digest: str) -> dict[str, Any]:
    """Assert that our server reports the vector's digest only for a steered request, and that all blocks are armed.

    Returns the facts of its worker.
    """
    from steer_engine.spec import Op

    plain, steered = ours.complete({}), ours.complete(STEERING)
    assert digest in str(steered["steering"]), steered
    assert not plain.get("steering")
    assert "steering" not in stock.complete({})
    assert steered["choices"][0]["text"] != plain["choices"][0]["text"]
    worker: dict[str, Any] = ours.get("/v1/steering/stats")["engine"]["workers"][0]
    assert worker["armed_blocks"] == worker["stage_blocks"]
    assert worker["ops"] == list(Op)
    return {fact: worker[fact] for fact in ("runner", "kernel", "armed_blocks", "ops")}


def _bench(client: ArmProcess, server: Server, load: Load, extra_body: dict[str, Any], number: int) -> Timing:
    round_load = replace(load, seed=1 + number).to_json()
    return Timing.from_json(client.command("bench", load=round_load, url=server.url, extra_body=extra_body))
