"""Derive a vector, serve the model, ask, score, stop: `make demo`. Exit status 1 if the effect is not there."""

from __future__ import annotations

import json
import shlex
import time

from rich.text import Text

from steer_engine.demo import prompts, show
from steer_engine.demo.asking import MAX_TOKENS, REPETITION_PENALTY, Asker, steering
from steer_engine.demo.machine import describe_machine, describe_software, gpu_name
from steer_engine.demo.scoring import find_faults, shift
from steer_engine.demo.server import Server
from steer_engine.demo.vector import BLOCKS, METHOD, NAME, derive_once, pairs_path
from steer_engine.errors import SteerError
from steer_engine.models import PACKAGED, cache_dir, get_model

MODEL = "smollm2-135m"
SCALE = 0.3
"""In units of the derived vector, whose norm is 7 to 18 % of the residual stream's at its blocks."""

SERVER_FLAGS = ["--max-model-len", "1024", "--max-num-seqs", "32"]
CPU_FLAGS = ["--enforce-eager"]
"""Compiling takes longer on two cores than the whole demo does without."""

CPU_DTYPE = "float32"
"""A processor with AVX2 only multiplies bfloat16 matrices 13 times slower (32 rows of 576, one core)."""


def main() -> int:
    began = time.monotonic()
    out = show.console
    out.print(f"[bold]Steer Engine demo[/bold]: {PACKAGED[MODEL].title}")
    out.print(f"on {describe_machine()}; {describe_software()}\n")

    with show.step("model: find or convert the checkpoint"):
        model_path = str(get_model(PACKAGED[MODEL], lambda line: out.print(f"   {line}", style="dim")))
    dtype = "auto" if gpu_name() else CPU_DTYPE
    with show.step(f"vector: {METHOD} of {pairs_path().name}, blocks {BLOCKS}, read in {dtype}"):
        vectors = derive_once(MODEL, model_path, dtype)

    flags = [*SERVER_FLAGS, "--dtype", dtype, *([] if gpu_name() else CPU_FLAGS)]
    command = [MODEL, "--steering-vectors", str(vectors), *flags]
    with Server(command, cache_dir() / "demo" / "server.log") as server:
        with show.step("server: vLLM, armed") as tick:
            server.wait_until_ready(tick)
        faults = ask_and_score(Asker(server.url, MODEL, NAME))
    if server.status != 0:
        faults.append(f"the server ended with status {server.status}; see {server.log}")

    out.print("\n[bold]Go on with[/bold] the same server, and ask it:")
    out.print(f"  .venv/bin/steer-engine serve {shlex.join([*command, '--port', '8000'])}", soft_wrap=True)
    out.print(f"  {curl_line(8000)}\n", soft_wrap=True)
    for fault in faults:
        out.print(f"[bold red]not shown:[/bold red] {fault}")
    verdict = "[bold red]failed[/bold red]" if faults else "[bold green]passed[/bold green]"
    out.print(f"demo {verdict} in {time.monotonic() - began:.0f} s; server log: {server.log}", soft_wrap=True)
    return 1 if faults else 0


def ask_and_score(asker: Asker) -> list[str]:
    """Everything that is asked while the server runs; what was not shown, as sentences."""
    scales = (-SCALE, 0.0, SCALE)
    with show.step(f"{len(prompts.SHOWN)} prompts at three scales"):
        shown = asker.ask_sides(prompts.SHOWN, scales)
    show.show_answers(prompts.SHOWN, shown)

    mixed = [(prompt, scale) for prompt in prompts.SHOWN for scale in (None, -SCALE, SCALE / 2, SCALE)]
    with show.step(f"{len(mixed)} requests in flight at once"):
        replies, num_running = asker.ask_watched(mixed)
    show.show_batch(replies, num_running)

    with show.step(f"{len(prompts.HELD_OUT)} held-out prompts a side"):
        low, plain, high = asker.ask_sides(prompts.HELD_OUT, scales)
    shifts = [
        shift("gloomy to plain", low, plain),
        shift("plain to cheerful", plain, high),
        shift("gloomy to cheerful", low, high),
    ]
    show.show_scores((low, plain, high), shifts, len(prompts.HELD_OUT))

    faults = find_faults(plain, (low, high), shifts)
    if any((reply.scale is None) != (reply.digest is None) for reply in replies):
        faults.append("an answer does not say what it was asked to be steered by")
    if num_running < 2:
        faults.append("the mixed requests were not in one batch")
    return faults


def curl_line(port: int) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompts.SHOWN[0]}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "repetition_penalty": REPETITION_PENALTY,
        "steering": steering(NAME, SCALE),
    }
    return f"curl -s localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SteerError as error:
        show.console.print("[bold red]error:[/bold red]", Text(error.message), soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
