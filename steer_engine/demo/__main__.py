"""Derive a vector, serve the model, ask, score, stop: `make demo`. Exit status 1 if the effect is not there."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from importlib.resources import files
from pathlib import Path

from rich.text import Text

from steer_engine import __version__
from steer_engine.demo import answers, scoring
from steer_engine.demo.answers import MAX_TOKENS, REPETITION_PENALTY, Asker, steering
from steer_engine.demo.scoring import find_faults, shift
from steer_engine.demo.server import Server, describe_machine, describe_software, gpu_name
from steer_engine.errors import SteerError
from steer_engine.models import MANIFEST, PACKAGED, cache_dir, get_model, sha256_of
from steer_engine.vectors import save

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
    out = answers.console
    out.print(f"[bold]Steer Engine demo[/bold]: {PACKAGED[MODEL].title}")
    out.print(f"on {describe_machine()}; {describe_software()}\n")

    with answers.step("model: find or convert the checkpoint"):
        model_path = str(get_model(PACKAGED[MODEL], lambda line: out.print(f"   {line}", style="dim")))
    dtype = "auto" if gpu_name() else CPU_DTYPE
    with answers.step(f"vector: {METHOD} of {pairs_path().name}, blocks {BLOCKS}, read in {dtype}"):
        vectors = derive_once(MODEL, model_path, dtype)

    flags = [*SERVER_FLAGS, "--dtype", dtype, *([] if gpu_name() else CPU_FLAGS)]
    command = [MODEL, "--steering-vectors", str(vectors), *flags]
    with Server(command, cache_dir() / "demo" / "server.log") as server:
        with answers.step("server: vLLM, armed") as tick:
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
    with answers.step(f"{len(scoring.SHOWN)} prompts at three scales"):
        shown = asker.ask_sides(scoring.SHOWN, scales)
    answers.show_answers(scoring.SHOWN, shown)

    mixed = [(prompt, scale) for prompt in scoring.SHOWN for scale in (None, -SCALE, SCALE / 2, SCALE)]
    with answers.step(f"{len(mixed)} requests in flight at once"):
        replies, num_running = asker.ask_watched(mixed)
    answers.show_batch(replies, num_running)

    with answers.step(f"{len(scoring.HELD_OUT)} held-out prompts a side"):
        low, plain, high = asker.ask_sides(scoring.HELD_OUT, scales)
    shifts = [
        shift("gloomy to plain", low, plain),
        shift("plain to cheerful", plain, high),
        shift("gloomy to cheerful", low, high),
    ]
    answers.show_scores((low, plain, high), shifts, len(scoring.HELD_OUT))

    faults = find_faults(plain, (low, high), shifts)
    if any((reply.scale is None) != (reply.digest is None) for reply in replies):
        faults.append("an answer does not say what it was asked to be steered by")
    if num_running < 2:
        faults.append("the mixed requests were not in one batch")
    return faults


def curl_line(port: int) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": scoring.SHOWN[0]}],
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
        answers.console.print("[bold red]error:[/bold red]", Text(error.message), soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


NAME = "cheerful"
METHOD = "diffmean"
BLOCKS = "8-19"
POSITION = "last"


def pairs_path() -> Path:
    """The contrast pairs that ship with the package."""
    return Path(str(files("steer_engine.derive").joinpath("data", "sentiment.jsonl")))


def vector_folder(model_path: str, dtype: str) -> Path:
    """Folder of the vector for these inputs; another model, pairs, settings or version is another folder."""
    weights = Path(model_path, MANIFEST)
    inputs = [sha256_of(weights), sha256_of(pairs_path()), METHOD, BLOCKS, POSITION, dtype, __version__]
    return cache_dir() / "demo" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def derive_once(model: str, model_path: str, dtype: str) -> Path:
    """The folder that holds the vector's file, derived if it is not there yet. `model` is what the vector calls it."""
    folder = vector_folder(model_path, dtype)
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        # Imported here: only a first run needs Ray.
        from steer_engine.derive import derive

        vector = derive(model, pairs_path(), method=METHOD, blocks=BLOCKS, position=POSITION, dtype=dtype)
        folder.mkdir(parents=True, exist_ok=True)
        save(vector, file)
    return folder
