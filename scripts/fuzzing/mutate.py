"""Seeded mutations of JSON trees, of encoded bodies, and of vector files.

Every function takes the random generator first and returns a new value. Kinds are listed in TREE, ENCODED and FILE, and
a request keeps the names of those that were applied to it.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from helpers.damage import PIECES


class Text(str):
    """JSON text that is written as it is, such as a number that Python cannot hold."""


class Pairs(list[tuple[str, Any]]):
    """An object that may have the same key twice."""


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, "", " ", [], {}, 0, -1, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30),
    *(-0.0, 1e-320, 1e38, -1e308, Text("NaN"), Text("Infinity"), Text("-Infinity"), Text("1e999"), Text("9" * 5000)),
    *("NaN", "null", "false", "0", "1e999", "x" * 5000, "\0", "\u202e\u200b", "\U0001f642" * 50, Text('"\\ud800"')),
    *("../../etc/passwd", "sha256:" + "0" * 64, "sha256:", "0-99999999999999999999", "house\0", "{0.__class__}%s"),
    *([[[]]], [None], [0] * 300, ["house"] * 300, {"": {}}, {"edits": {}}, {"data": "AAAA"}, {"data": "!"}, {"a": [1]}),
    *(Text("[" * 3000 + "]" * 3000), Text('{"a":' * 3000 + "1" + "}" * 3000)),
)
"""What replaces a value."""

ELSEWHERE = ("metadata", "extra_body", "chat_template_kwargs", "options", "extra_args", "kv_transfer_params")
"""Objects of a request that no endpoint reads steering from."""

SPELLINGS = ("Steering", "STEERING", " steering", "steering ", "\uff53teering", "steering\u200b", "steer", "steerings")
MEDIA_TYPES = ("text/plain", "application/xml", "multipart/form-data; boundary=x", "application/json; charset=utf-16",
               "application/x-www-form-urlencoded", "", "x" * 3000)  # fmt: skip

Body = dict[str, Any] | Pairs
Place = tuple[Any, Any]
"""A container and a key or index in it."""


def dump(value: Any) -> str:
    """JSON text; `Text` and `Pairs` as they are meant."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, Pairs | dict):
        members = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(each)}" for key, each in members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> Iterator[Place]:
    """Every member of every container, parents first."""
    members: Any = value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ()
    for key, each in members:
        yield value, key
        yield from places(each)


def _place(rng: Random, body: dict[str, Any]) -> Place | None:
    """Mostly within the steering field, which is what matters here."""
    root = body["steering"] if isinstance(body.get("steering"), dict | list) and rng.random() < 0.6 else body
    found = list(places(root)) or list(places(body))
    return rng.choice(found) if found else None


def replace_value(rng: Random, body: dict[str, Any]) -> Body:
    if (place := _place(rng, body)) is not None:
        place[0][place[1]] = copy(rng.choice(HOSTILE))
    return body


def drop_member(rng: Random, body: dict[str, Any]) -> Body:
    if (place := _place(rng, body)) is not None:
        del place[0][place[1]]
    return body


def repeat_key(rng: Random, body: dict[str, Any]) -> Body:
    """The same key twice in the request, or in the steering object; the second value is often another one."""
    inner = body.get("steering")
    if isinstance(inner, dict) and inner and rng.random() < 0.4:
        body["steering"] = _repeated(rng, inner)
        return body
    return _repeated(rng, body) if body else body


def _repeated(rng: Random, members: dict[str, Any]) -> Pairs:
    key = "steering" if "steering" in members and rng.random() < 0.6 else rng.choice(list(members))
    value = members[key] if rng.random() < 0.3 else copy(rng.choice(HOSTILE))
    pairs = Pairs(members.items())
    pairs.insert(rng.choice((0, len(pairs))), (key, value))
    return pairs


def unknown_field(rng: Random, body: dict[str, Any]) -> Body:
    inside = [container for container, _ in places(body) if isinstance(container, dict)]
    name = rng.choice(("surprise", "_steer_program", "__proto__", "k" * 3000, "\0", "capture", "preset"))
    rng.choice([body, *inside])[name] = copy(rng.choice(HOSTILE))
    return body


def move_steering(rng: Random, body: dict[str, Any]) -> Body:
    """Steering into a place that no endpoint reads it from."""
    if "steering" not in body:
        return unknown_field(rng, body)
    moved = {"steering": body.pop("steering")}
    where = rng.choice((*ELSEWHERE, "a message", "text", "raw xargs"))
    if where == "a message" and isinstance(body.get("messages"), list) and body["messages"]:
        body["messages"] = [_with(body["messages"][0], moved), *body["messages"][1:]]
    elif where == "raw xargs":
        body["vllm_xargs"] = moved
    elif where == "text":
        body["extra_body"] = dump(moved)
    else:
        body[where if where in ELSEWHERE else "metadata"] = moved
    return body


def _with(message: Any, fields: dict[str, Any]) -> Any:
    if isinstance(message, list):  # a conversation of a batch
        return [_with(message[0], fields), *message[1:]] if message else [fields]
    return message | fields if isinstance(message, dict) else fields


def misspell(rng: Random, body: dict[str, Any]) -> Body:
    key = "steering" if "steering" in body else next(iter(body), "steering")
    body[rng.choice(SPELLINGS)] = body.pop(key, None)
    return body


def copy(value: Any) -> Any:
    """A copy of a tree, so that no mutation reaches the corpus. `Text` is kept."""
    if isinstance(value, dict):
        return {key: copy(each) for key, each in value.items()}
    return [copy(each) for each in value] if type(value) is list else value


TREE: dict[str, Callable[[Random, dict[str, Any]], Body]] = {
    "replace a value": replace_value,
    "drop a member": drop_member,
    "unknown field": unknown_field,
    "move steering": move_steering,
    "misspell steering": misspell,
    "repeat a key": repeat_key,
}
"""Applied in this order: a tree with a repeated key is not mutated further."""


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _piece(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(PIECES) + data[at + rng.randrange(20) :]


def _encoding(rng: Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")), "surrogatepass")


def _escape(rng: Random, data: bytes) -> bytes:
    return data.replace(b'"steering"', rng.choice((rb'"\u0073teering"', rb'"steerin\u0067"')))


def _surround(rng: Random, data: bytes) -> bytes:
    before, after = rng.choice(((b"[", b"]"), (b"", b"}"), (b"", data), (b"\xef\xbb\xbf", b""), (b"\0", b""),
                                (b" " * 3000, b""), (b"/**/", b""), (b"", b"\n//"), (b'{"a": ', b"}")))  # fmt: skip
    return before + data + after


ENCODED: dict[str, Callable[[Random, bytes], bytes]] = {
    "truncate": _cut,
    "flip bits": _flip,
    "put in a piece": _piece,
    "other encoding": _encoding,
    "escape the field": _escape,
    "surround": _surround,
}

HEADERS: dict[str, Callable[[Random, bytes], tuple[bytes, dict[str, str]]]] = {
    "gzip": lambda _, data: (gzip.compress(data, mtime=0), {"content-encoding": "gzip"}),
    "false gzip": lambda rng, data: (data, {"content-encoding": rng.choice(("gzip", "br", "zstd", "deflate, gzip"))}),
    "media type": lambda rng, data: (data, {"content-type": rng.choice(MEDIA_TYPES)}),
    "precondition": lambda rng, data: (data, {"if-match": rng.choice(('"', "*", "sha256:", "x" * 3000, "W/", ","))}),
}


def _length(rng: Random, data: bytes) -> bytes:
    """The length of a safetensors header, or GGUF's version and number of tensors, becomes a huge or odd number."""
    number = rng.choice((0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1, len(data), len(data) + 1))
    at = rng.choice((8, 16)) if data.startswith(b"GGUF") else 0
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


def _header(rng: Random, data: bytes) -> bytes:
    """A safetensors header that is damaged as JSON, with a length that fits; other files get a flipped bit."""
    if data.startswith(b"GGUF") or len(data) < 8:
        return _flip(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    try:
        tree = json.loads(data[8 : 8 + length])
    except ValueError:  # damaged before
        return _flip(rng, data)
    if not isinstance(tree, dict):
        return _flip(rng, data)
    kind = rng.choice((replace_value, drop_member, unknown_field, repeat_key))
    header = dump(kind(rng, tree)).encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _numbers(rng: Random, data: bytes) -> bytes:
    """The last numbers of the file are not finite, or huge."""
    bad = rng.choice((float("nan"), float("inf"), 3e38))
    return data[:-8] + struct.pack("<2f", bad, -bad)


FILE: dict[str, Callable[[Random, bytes], bytes]] = {
    "truncate": _cut,
    "flip bits": _flip,
    "put in a piece": _piece,
    "huge lengths": _length,
    "damaged header": _header,
    "not finite": _numbers,
    "grow": lambda rng, data: data + rng.randbytes(rng.choice((1, 8, 70_000))),
    "zeros": lambda _, data: data[: len(data) - 4 * 64] + bytes(4 * 64),
}
