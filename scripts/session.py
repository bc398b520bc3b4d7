"""Records what a server answers to a fixed list of requests, and compares two such records.

    scripts/session.py record OUT.json [--python PY] [--pythonpath P]
    scripts/session.py compare A.json B.json

`record` starts its own server with the Steer Engine that PY imports, sends the requests one at a time, and writes
status, headers and body of each answer. Values that differ between any two runs, such as ids and times, are masked.
`compare` prints every difference and ends with 1 if there is one. It lists separately, without counting them, error
messages and the rounding of logprobs in answers with several choices: timing decides which of these share a step.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

FILES = ["vectors/north", "vectors/east", "vectors/gate", "first", "second"]  # the last two are sent in requests
START_SECONDS, STOP_SECONDS, KEY = 300, 90, "a-key-of-sixteen-chars"
ROUNDING = 1e-4
HEADERS = ("x-steering", "x-steering-preset", "retry-after", "etag", "content-type")
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8",
         "--steering-capture", "all", "--gpu-memory-utilization", "0.2", "--enable-scale-out")  # fmt: skip
WRITER = """
import json, sys
import numpy as np
import steer_engine
from steer_engine.vectors import ControlVector, VectorMetadata, save
digests = {}
for seed, name in enumerate(sys.argv[1:]):
    rows = np.random.default_rng(seed).standard_normal((30, 576))
    rows = (3.0 * rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    metadata = VectorMetadata(num_blocks=30, residual_norms={block: 40.0 + block for block in range(30)})
    vector = ControlVector(directions=dict(enumerate(rows)), metadata=metadata)
    save(vector, f"{name}.safetensors")
    digests[name] = vector.digest
print(json.dumps([steer_engine.__file__, digests]))
"""
MODEL = "smollm2-135m"
PROMPT = "Describe the weather today in one sentence."
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
JSON, BINARY = {"content-type": "application/json"}, {"content-type": "application/octet-stream"}
ADMIN, STREAM = JSON | {"x-steering-admin-key": KEY}, {"stream": True}
VOLATILE = {"created", "created_at", "completed_at", "system_fingerprint", "timestamp", "timestamps"}
IDS = {"id", "request_id", "response_id", "item_id"}
ID_TEXT = re.compile(r"\b(msg|resp|chatcmpl|cmpl|rs|generate-tokens|embd|modelperm)[_-][0-9a-zA-Z-]+")


class Request(NamedTuple):
    """One request. body: bytes are sent as they are, anything else as JSON."""

    name: str
    path: str
    body: Any = None
    method: str = "POST"
    headers: Mapping[str, str] = JSON


def edit(**fields: Any) -> dict[str, Any]:
    """A `steering` object with one edit, strong enough to change the text."""
    return {"edits": [{"vector": "north", "scale": 3.0, "blocks": "8-19", **fields}]}


def chats(digest: str, file: bytes) -> Iterator[Request]:
    """Chat completions. digest: of the vector north. file: a vector to send inline."""
    path, body = "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    phases = {"phases": ["prompt", "generation"]}
    steerings: dict[str, Any] = {
        "by name": edit(),
        "by digest": edit(vector=digest),
        "inline vector": edit(vector={"data": base64.b64encode(file).decode()}),
        "op add": edit(op="add", blocks=[3, 12]),
        "op add_relative": edit(op="add_relative", scale=0.3),
        "op ablate": edit(op="ablate", scale=1.0),
        "op clamp": {"edits": [{"vector": "north", "op": "clamp", "lo": 5.0, "hi": 9.0, "blocks": "8-19"}]},
        "op set": {"edits": [{"vector": "north", "op": "set", "target": 12.0, "blocks": 14}]},
        "gate": edit(gate={"vector": "gate", "min_cos": 0.0}),
        "preserve_norm": edit() | {"preserve_norm": True},
        "unit residual": edit(unit="residual", scale=0.5),
        **{f"scope {scope}": edit(scope=scope) for scope in ("all", "prompt", "generation")},
        "scope span": edit(scope={"start": 2, "end": -1}),
        "preset by field": {"preset": "calm"},
        "false": False,
        "null": None,
        "EasySteer": {"vectors": [{"source": "east", "scale": 8.0, "layers": [8, 9], "apply": phases}]},
        "capture": edit() | {"capture": {"blocks": [9, 20], "positions": "last"}},
    }
    yield Request("chat plain", path, body)
    for name, steering in steerings.items():
        yield Request(f"chat {name}", path, body | {"steering": steering})
    steered = body | {"steering": edit()}
    yield Request("chat n=2 seed", path, steered | {"n": 2, "seed": 7, "temperature": 0.9})
    yield Request("chat logprobs", path, steered | {"top_logprobs": 5})
    yield Request("chat stream", path, steered | STREAM)
    yield Request("chat stream usage", path, steered | STREAM | {"stream_options": {"include_usage": True}})
    yield Request("chat preset by model", path, body | {"model": f"{MODEL}:calm"})
    yield Request("chat xargs", path, body | {"vllm_xargs": {"steering": json.dumps(edit(vector="east"))}})
    yield Request("chat hotwire", path, body | {"vllm_xargs": {"hotwire": '{"id":"east", "layer": 12, "scale": 20.0}'}})
    yield Request("batch steered", f"{path}/batch", steered | {"messages": [MESSAGES, MESSAGES]})
    yield Request("invocations", "/invocations", steered)


def others() -> Iterator[Request]:
    """Every other endpoint that generates."""
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": 2, "ignore_eos": True}
    plain = {"model": MODEL, "prompt": PROMPT, **sampling}
    steering = {"steering": edit()}
    responses = {"model": MODEL, "temperature": 0, "input": PROMPT, "max_output_tokens": 6} | steering
    tokens = {"model": MODEL, "token_ids": [504, 2365, 282], "sampling_params": sampling}
    yield Request("completions plain", "/v1/completions", plain)
    yield Request("completions two prompts", "/v1/completions", plain | steering | {"prompt": ["My day", "The sea"]})
    yield Request("completions echo", "/v1/completions", plain | steering | {"echo": True})
    capture = {"capture": {"blocks": 9, "positions": "mean"}}
    yield Request("completions capture", "/v1/completions", plain | {"steering": capture})
    yield Request("generate steered", "/inference/v1/generate", tokens | steering)
    streamed = {"/v1/completions": plain | steering, "/v1/responses": responses, "/v1/messages": CHAT | steering}
    for path, body in {**streamed, "/inference/v1/generate": tokens}.items():
        yield Request(path, path, body)
        yield Request(f"{path} stream", path, body | STREAM)
    yield Request("tokenize", "/tokenize", {"model": MODEL, "prompt": PROMPT})


def registry(first: bytes, second: bytes, digest: str) -> Iterator[Request]:
    """The registry's routes, and refused requests. first, second: files to upload; digest: of the first."""
    vectors, presets, spec = "/v1/steering/vectors", "/v1/steering/presets", edit(vector="east")
    for path in ("/readyz", "/v1/models", "/v1/steering", vectors, f"{vectors}/north"):
        yield Request(path, path, method="GET")
    yield Request("vector put new", f"{vectors}/west", first, "PUT", ADMIN | BINARY)
    yield Request("vector put replace", f"{vectors}/west", second, "PUT", ADMIN | BINARY | {"if-match": digest})
    yield Request("error if-match", f"{vectors}/west", first, "PUT", ADMIN | BINARY | {"if-match": digest})
    yield Request("vector delete", f"{vectors}/west", None, "DELETE", ADMIN)
    yield Request("preset put", f"{presets}/loud", spec, "PUT", ADMIN)
    yield Request("presets list", presets, method="GET")
    yield Request("preset show", f"{presets}/loud", method="GET")
    yield Request("preset delete", f"{presets}/loud", None, "DELETE", ADMIN)
    yield Request("validate", "/v1/steering/validate", spec)
    yield Request("error no admin key", f"{vectors}/west", first, "PUT", BINARY)
    yield Request("error content type", f"{vectors}/west", first, "PUT", ADMIN | {"content-type": "text/plain"})
    wrong: dict[str, dict[str, Any]] = {
        "unknown vector": {"steering": edit(vector="nobody")},
        "specified twice": {"steering": edit(), "vllm_xargs": {"steering": json.dumps(edit())}},
        "scale too large": {"steering": edit(scale=5000.0)},
        "unknown field": {"steering": edit(strength=2)},
        "block out of range": {"steering": edit(blocks=[99])},
        "reserved key": {"vllm_xargs": {"_steer": "x"}},
        "beam search": {"steering": edit(), "use_beam_search": True, "n": 2},
    }
    for name, fields in wrong.items():
        yield Request(f"error {name}", "/v1/chat/completions", CHAT | fields)
    yield Request("error malformed JSON", "/v1/chat/completions", b'{"model": "smollm2-135m", "steering": {')
    yield Request("error embeddings", "/v1/embeddings", {"model": MODEL, "input": PROMPT, "steering": edit()})
    yield Request("stats", "/v1/steering/stats", method="GET")  # last: it counts all of the above


def masked(value: Any, key: str = "") -> Any:
    """The value without what differs between any two runs. The file of a capture is split into header and numbers."""
    if isinstance(value, dict):
        if key == "capture" and "data" in value:  # safetensors does not write the keys of its header in a fixed order
            file = base64.b64decode(value["data"])
            start = 8 + int.from_bytes(file[:8], "little")
            value = value | {"data": [json.loads(file[8:start]), base64.b64encode(file[start:]).decode()]}
        return {name: masked(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [masked(each, key) for each in value]
    if value is not None and (key in VOLATILE or (key in IDS and re.search("[0-9a-f]{8}", str(value)))):
        return "(masked)"
    return ID_TEXT.sub("(masked)", value) if isinstance(value, str) else value


def decoded(text: str, content_type: str = "") -> Any:
    """A body, or a field of an event: JSON, a list of server-sent events, or text."""
    if content_type.startswith("text/event-stream"):
        blocks = text.replace("\r\n", "\n").strip().split("\n\n")
        events = [[line.partition(": ") for line in block.splitlines()] for block in blocks]
        return [{kind: decoded(value) for kind, _, value in lines} for lines in events]
    with suppress(ValueError):
        return json.loads(text)
    return text


def answered(client: httpx.Client, request: Request) -> dict[str, Any]:
    """Send one request; its record."""
    content: dict[str, Any] = {"content" if isinstance(request.body, bytes) else "json": request.body}
    response = client.request(request.method, request.path, headers=dict(request.headers), **content)
    kept = {name: response.headers[name] for name in HEADERS if name in response.headers}
    record = {"name": request.name, "method": request.method, "path": request.path, "status": response.status_code}
    return record | {"headers": kept, "body": masked(decoded(response.text, kept.get("content-type", "")))}


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"The server is not ready; the end of its log:\n{log.read_text(errors='replace')[-6000:]}")


def record(out: Path, python: str, pythonpath: str | None) -> int:
    """Start a server, send all requests and write the answers to `out`. Returns 0."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"STEER_ENGINE_ADMIN_KEYS": KEY} | ({"PYTHONPATH": pythonpath} if pythonpath else {})
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder), Path(folder) / "server.log"
        (root / "vectors").mkdir()
        (root / "vectors" / "calm.preset.json").write_text(json.dumps(edit(vector="east", scale=-4.0)))
        writer = [python, "-P", "-c", WRITER, *FILES]
        done = subprocess.run(writer, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
        package, digests = json.loads(done.stdout.splitlines()[-1])
        first, second = ((root / f"{name}.safetensors").read_bytes() for name in ("first", "second"))
        requests = [*chats(digests["vectors/north"], first), *others(), *registry(first, second, digests["first"])]
        command = [python, "-P", "-m", "steer_engine", "serve", MODEL, "--steering-vectors", str(root / "vectors")]
        command += [*FLAGS, "--host", "127.0.0.1", "--port", str(port)]
        output: dict[str, Any] = {"stdout": log.open("wb"), "stderr": subprocess.STDOUT}
        server = subprocess.Popen(command, env=environment, cwd=root, start_new_session=True, **output)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                wait_until_ready(client, server, log)
                answers = [answered(client, request) for request in requests]
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)  # with its engine processes
    out.write_text(json.dumps({"package": package, "answers": answers}, indent=1) + "\n")
    print(f"{len(answers)} answers of {package} -> {out}")
    return 0


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every field that holds no other field."""
    if not value or not isinstance(value, dict | list):
        yield path, value
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(each, f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}")


def fields(answer: dict[str, Any]) -> dict[str, Any]:
    """Path -> value. Of a stream: the values in order without repeats, text joined, since timing decides how many
    tokens vLLM puts into one event."""
    if not answer.get("headers", {}).get("content-type", "").startswith("text/event-stream"):
        return dict(leaves(answer))
    found = dict(leaves({**answer, "body": "a stream"}))
    for path, value in leaves(answer["body"], ".body"):
        values = found.setdefault(re.sub(r"\[\d+\]", "", path), [])
        if path.endswith((".content", ".text", ".delta")) and values and {type(value), type(values[-1])} == {str}:
            values[-1] += value
        elif values[-1:] != [value] and not path.endswith(".sequence_number"):
            values.append(value)
    return found


def kind(answer: dict[str, Any], path: str, old: Any, new: Any) -> str:
    """The group of a difference."""
    if path.endswith(".error.message"):
        return "messages"
    body = answer.get("body")
    several = isinstance(body, dict) and len(body.get("choices", ())) > 1
    numbers = "logprob" in path and isinstance(old, float) and isinstance(new, float)
    return "rounding" if several and numbers and abs(old - new) <= ROUNDING else "differences"


def compare(a: Path, b: Path) -> int:
    """Print how two records differ. Returns 0 if at most error messages and rounding do."""
    left, right = ({each["name"]: each for each in json.loads(path.read_text())["answers"]} for path in (a, b))
    groups: dict[str, list[list[str]]] = {"differences": [], "rounding": [], "messages": []}
    for name in {**left, **right}:
        if name not in left or name not in right:
            groups["differences"].append([name, f"only in {a if name in left else b}"])
            continue
        old, new = fields(left[name]), fields(right[name])
        for path in {**old, **new}:
            values = [side.get(path, "(absent)") for side in (old, new)]
            texts = [json.dumps(value) for value in values]
            if texts[0] != texts[1]:
                groups[kind(left[name], path, *values)].append([name + path, *texts])
    for title, group in groups.items():
        print(f"{title}: {len(group)}", *("\n    ".join(each) for each in group), sep="\n  ")
    if groups["differences"]:
        print("different")
        return 1
    print("identical but for what is listed" if any(groups.values()) else "identical")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path, help="record: the file to write. compare: two records.")
    parser.add_argument("--python", default=sys.executable, help="Python of the server. Default: this one.")
    parser.add_argument("--pythonpath", help="PYTHONPATH of the server, to run another checkout.")
    args = parser.parse_args()
    if len(args.files) != (1 if args.command == "record" else 2):
        parser.error("record takes one file, compare takes two.")
    if args.command == "record":
        return record(args.files[0], args.python, args.pythonpath)
    return compare(*args.files)


if __name__ == "__main__":
    sys.exit(main())
