"""What an answer must keep to, decided by the bytes that were sent and not by the server's own search for steering."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from typing import Any

from helpers.attack import quiet

from fuzzing.corpus import GENERATING, HOUSE, MODEL, Sent
from fuzzing.mutate import ELSEWHERE, Pairs

_ERROR = re.compile(r'"error": ?\{')
_STREAMED_ERROR = re.compile(r'"code": ?(5\d\d)')
_HINTS = (b"steer", b"hotwire", b"\\u", b"\0", f":{HOUSE}".encode())


def asks(content: bytes) -> bool:
    """Whether a body clearly asks for steering: valid JSON with a value for it in a place where clients put it."""
    return asks_by_model(content) or any(_asks(key, value) for key, value in _decoded(content))


def asks_by_model(content: bytes) -> bool:
    """Whether a body names the preset behind the model. A parser keeps the last of two models."""
    return dict(_decoded(content)).get("model") == f"{MODEL}:{HOUSE}"


def _decoded(content: bytes) -> Pairs:
    """The members of a body; none if it is no JSON object."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError):
            return Pairs()
    try:
        body = json.loads(content, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return Pairs()
    return body if isinstance(body, Pairs) else Pairs()


def asks_nothing(content: bytes) -> bool:
    """Whether nothing in a body could be taken for steering."""
    lower = content.lower()
    return content.isascii() and not any(hint in lower for hint in _HINTS)


def _asks(key: str, value: Any) -> bool:
    if key == "steering":
        return _says_something(value)
    if key == "vllm_xargs":
        return _has_steering(value)
    if key in ELSEWHERE:
        return _has_steering(_object(value))
    if key == "messages" and type(value) is list:
        flat = [each for one in value for each in (one if type(one) is list else [one])]
        return any(_has_steering(each) for each in flat)
    return False


def _has_steering(value: Any) -> bool:
    return isinstance(value, Pairs) and any(key == "steering" and _says_something(each) for key, each in value)


def _says_something(value: Any) -> bool:
    """Only null and false, also as JSON text, say that no steering is specified."""
    text = value.strip() if isinstance(value, str) else ""
    return value is not None and value is not False and text not in ("null", "false")


def _object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return None


def verdict(sent: Sent, status: int, headers: Mapping[str, str], text: str) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if status == 503 and "retry-after" in headers:
        return None
    if status >= 500 and not (status == 507 and sent.method == "PUT"):
        return f"{status}, not promised"
    if status < 300 and sent.method == "POST" and (wrong := _wrong_200(sent, headers, text)) is not None:
        return wrong
    if status >= 400 and "/v1/steering" in sent.path:
        try:
            quiet(text, sent.content + sent.path.encode())
        except AssertionError:
            return f"{status} shows something of the server, or repeats too much of the request"
    return None


def _wrong_200(sent: Sent, headers: Mapping[str, str], text: str) -> str | None:
    if sent.path not in GENERATING:
        # `validate` reads a spec and generates nothing; the others cannot carry steering.
        steerable = sent.path.startswith("/v1/steering")
        by_model = b":house" in sent.content  # /tokenize accepts the name of a preset
        return "steering ignored by a route" if not steerable and not by_model and asks(sent.content) else None
    if asks(sent.content):
        if "x-steering" not in headers:
            return "silently unsteered: no X-Steering"
        ended_by_error = "event-stream" in headers.get("content-type", "") and _ERROR.search(text)
        if sent.path != "/v1/messages" and '"steering"' not in text and not ended_by_error:
            return "silently unsteered: no 'steering' in the answer"
    elif "x-steering" in headers and asks_nothing(sent.content):
        return "steered without being asked"
    if "event-stream" in headers.get("content-type", "") and _ERROR.search(text):
        found = _STREAMED_ERROR.search(text)
        return f"{found[1]} within a stream" if found else None
    return None
