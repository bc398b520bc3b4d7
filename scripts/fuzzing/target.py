"""The server under test: a tiny armed one of our own, or a running one; and what must be the same after the fuzz."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from helpers.living import ADMIN, INFERENCE, along, features, low_rank
from helpers.server_process import Server, plain_vllm_serve, steer_engine_serve
from helpers.tiny_models import tiny_llama_path

from fuzzing.corpus import GENERATING, HOUSE, JSON, MODEL, PRESETS, REFT, SAE, VECTORS, Sent
from fuzzing.sending import Finding, Sender
from steer_engine.vectors.files import to_bytes

_FRAME = re.compile(r'File "([^"]+)", line')
_AFTER_TRACEBACK = re.compile(r"^INFO: |\bINFO \d", re.MULTILINE)

CHECKS = "after the fuzz"
FLAGS = ("--served-model-name", MODEL, "--api-key", INFERENCE, "--enable-scale-out")


@contextmanager
def own_server() -> Iterator[Server]:
    """An armed server of a random Llama of 3 blocks, as the corpus needs it."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder, "vectors")
        vectors.mkdir()
        for name, file in ((HOUSE, along(5)), (SAE, features()), (REFT, low_rank())):
            (vectors / f"{name}.safetensors").write_bytes(to_bytes(file))
        (vectors / f"{HOUSE}.preset.json").write_text(json.dumps({"edits": [{"vector": HOUSE}]}))
        armed = ("--steering-vectors", str(vectors), "--steering-sites", "attn,mlp", "--steering-capture", "all")
        command = steer_engine_serve(_model(folder), *FLAGS, *armed)
        server = Server(command, Path(folder, "server.log"), env={"STEER_ENGINE_ADMIN_KEYS": ADMIN})
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def unarmed_server() -> Iterator[Server]:
    """vLLM's own server of the same model."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(plain_vllm_serve(_model(folder), *FLAGS), Path(folder, "server.log"), ready_path="/health")
        try:
            yield server
        finally:
            server.kill()


def _model(folder: str) -> str:
    return str(tiny_llama_path(Path(folder)))


def processes(pid: int) -> dict[int, float]:
    """Process id -> time of its start, of a server and all processes below it."""
    server = psutil.Process(pid)
    return {each.pid: each.create_time() for each in (server, *server.children(recursive=True))}


def said(answer: Any) -> list[Any]:
    """The texts and tokens of an answer's JSON, in order."""
    if isinstance(answer, list):
        return [each for one in answer for each in said(one)]
    if not isinstance(answer, dict):
        return []
    found = []
    for key, value in answer.items():
        is_said = key == "token_ids" or (key in ("text", "content") and isinstance(value, str))
        found += [value] if is_said and value is not None else said(value)
    return found


def references(sender: Sender) -> dict[str, Any]:
    """Plain and steered greedy answers of every carrying path: status, what was said, and what was applied."""
    found: dict[str, Any] = {}
    for path, valid in GENERATING.items():
        for kind, fields in {"plain": {}, "steered": {"steering": {"edits": [{"vector": HOUSE}]}}}.items():
            body = {**valid, **fields} | ({"stream": False} if "stream" in valid else {})
            for limit in {"max_tokens", "max_output_tokens"} & set(body):
                body[limit] = 8  # enough that a random model says some text
            answer = sender.answer(Sent("reference", "POST", path, json.dumps(body).encode(), JSON))
            text = said(answer.json()) if answer.status_code == 200 else answer.text
            found[f"{kind} {path}"] = (answer.status_code, text, answer.headers.get("x-steering"))
    return found


def check_references(found: dict[str, Any]) -> None:
    """The references can show a difference: all are 200, and every steered one is another text than the plain one.

    Raises:
        SystemExit: they cannot.
    """
    for path in GENERATING:
        plain, steered = found[f"plain {path}"], found[f"steered {path}"]
        if (plain[0], steered[0]) != (200, 200) or plain[2] is not None or steered[2] is None or plain[1] == steered[1]:
            raise SystemExit(
                f"{path} does not give the reference answers: plain {plain}, steered {steered}. The server must serve "
                f"the model '{MODEL}' with the vector '{HOUSE}', with --enable-scale-out and without a default preset."
            )


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[Finding]:
    return [
        Finding(CHECKS, 0, f"the reference answer '{name}' changed", f"{before[name]} -> {after[name]}")
        for name in before
        if before[name] != after[name]
    ]


def clean_up(sender: Sender) -> None:
    """Delete every vector and preset that the fuzz has left; presets first, since they use vectors."""
    for where in (PRESETS, VECTORS):
        listed = sender.answer(Sent("clean up", "GET", f"{where}?limit=1000")).json()["data"]
        for entry in listed:
            if entry["name"] != HOUSE:
                sender.answer(Sent("clean up", "DELETE", f"{where}/{entry['name']}", admin=True))


def left_behind(server: Server) -> list[Finding]:
    """Uploads that were not removed, and tracebacks that end in our own code."""
    found = []
    incoming = Path(server.log_path.parent, "vectors", ".steer-engine", "incoming")
    if incoming.exists() and (files := list(incoming.iterdir())):
        found.append(Finding(CHECKS, 0, f"{len(files)} files of broken uploads are left", str(files[:3])))
    if ours := own_tracebacks(server.log):
        found.append(Finding(CHECKS, 0, f"{len(ours)} tracebacks of our own code in the log", ours[0][-2500:]))
    return found


def own_tracebacks(log: str) -> list[str]:
    """Tracebacks whose innermost frame is in this package. Those of vLLM pass through our middleware."""
    parts = [_AFTER_TRACEBACK.split(part)[0] for part in log.split("Traceback (most recent call last)")[1:]]
    return [part for part in parts if (frames := _FRAME.findall(part)) and "steer_engine" in frames[-1]]
