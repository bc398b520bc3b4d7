"""A server's app and engine in one process, which counts how often each kind of request is resolved.

    python resolving_server.py MODEL VECTORS OUT.json [FLAG ...]

VECTORS: a folder with the vector `house` and the preset `house`. OUT: {kind: [status, resolve calls, answer]}; the
kind "batch file" has the number of answered lines as its status.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SPEC = {"edits": [{"vector": "house"}]}
PRESET = {"preset": "house"}
MESSAGES = [{"role": "user", "content": "abc"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LINES = 5


def requests(inline: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind -> path and body."""
    text, chat = {"model": "tiny", "prompt": "abc", "max_tokens": 2}, {"model": "tiny", "max_tokens": 2}
    single = chat | {"messages": MESSAGES}
    tokens = {"model": "tiny", "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}}
    return {
        "unsteered": (COMPLETIONS, text),
        "named": (COMPLETIONS, text | {"steering": SPEC}),
        "inline": (COMPLETIONS, text | {"steering": {"edits": [{"vector": inline}]}}),
        "preset": (COMPLETIONS, text | {"steering": PRESET}),
        "preset by model name": (COMPLETIONS, text | {"model": "tiny:house"}),
        "vllm_xargs": (COMPLETIONS, text | {"vllm_xargs": {"steering": json.dumps(SPEC)}}),
        "list of prompts": (COMPLETIONS, text | {"prompt": ["abc", "de", "f"], "steering": SPEC}),
        "n=2": (COMPLETIONS, text | {"n": 2, "temperature": 1.0, "steering": SPEC}),
        "list of prompts and n=2": (COMPLETIONS, text | {"prompt": ["a", "b"], "n": 2, "steering": SPEC}),
        "capture": (COMPLETIONS, text | {"steering": SPEC | {"capture": {}}}),
        "chat": (CHAT, single | {"steering": SPEC}),
        "chat, n=2": (CHAT, single | {"n": 2, "temperature": 1.0, "steering": PRESET}),
        "chat batch": (f"{CHAT}/batch", chat | {"messages": [MESSAGES, MESSAGES], "steering": SPEC}),
        "responses": ("/v1/responses", {"model": "tiny", "input": "abc", "max_output_tokens": 2, "steering": SPEC}),
        "messages": ("/v1/messages", single | {"steering": SPEC}),
        "tokens": ("/inference/v1/generate", tokens | {"steering": SPEC}),
        "refused": (COMPLETIONS, text | {"steering": {"edits": [{"vector": "nobody"}]}}),
    }


async def main(model: str, vectors: Path, target: Path, flags: list[str]) -> None:
    from steer_engine.api.batch import resume, run
    from steer_engine.vllm.launch import parse_serve_flags

    args = parse_serve_flags([model, "--served-model-name", "tiny", "--steering-vectors", str(vectors), *flags])

    from helpers.counting import counted_resolving
    from steer_engine.vllm.launch import serving_app

    data = base64.b64encode((vectors / "house.safetensors").read_bytes()).decode()
    found: dict[str, Any] = {}
    async with serving_app(args) as ask:
        for kind, (path, body) in requests({"data": data}).items():
            with counted_resolving() as calls:
                status, answer = await ask(path, body)
            found[kind] = [status, len(calls), answer]
        source = target.with_suffix(".jsonl")
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "steering": SPEC}
        lines = [{"custom_id": str(i), "method": "POST", "url": COMPLETIONS, "body": body} for i in range(LINES)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers = target.with_suffix(".answers")
        with counted_resolving() as calls:
            tally = await run(source, answers, ask, finished=resume(answers), at_once=3)
        found["batch file"] = [tally.answered, len(calls), None]
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
