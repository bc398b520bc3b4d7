"""The seeded sequence of requests: number `i` of a seed is always the same request, alone or among thousands."""

from __future__ import annotations

from random import Random
from typing import Any
from urllib.parse import quote

from fuzzing.corpus import (
    BINARY,
    GENERATING,
    HOUSE,
    JSON,
    MODEL,
    NAMES,
    OTHER_POSTS,
    PRESETS,
    VALIDATE,
    VECTORS,
    Sent,
    foreign,
    in_xargs,
    reads,
    specs,
    vector_files,
)
from fuzzing.mutate import ENCODED, FILE, HEADERS, TREE, copy, dump

GENERATE, REGISTRY, UPLOAD, OTHER = "generating", "presets, validate", "uploads", "reads, deletes, other routes"
GROUPS = {GENERATE: 58, REGISTRY: 14, UPLOAD: 16, OTHER: 12}
"""Group -> its share in percent."""

HOSTILE_NAMES = ("..", "../..", "/etc/passwd", "a/b", "house\0", " house", ".house", "x" * 129, "\u00e9t\u00e9", "*",
                 "sha256:" + "0" * 64, "sha256:0", "%00", "\u202eesuoh", "house\nhouse")  # fmt: skip

VALID_SHARE = 0.08


def request(seed: int, number: int) -> Sent:
    """Request `number` of the sequence of `seed`."""
    rng = Random(f"{seed}:{number}")
    (group,) = rng.choices(list(GROUPS), weights=list(GROUPS.values()))
    return {GENERATE: _generate, REGISTRY: _registry, UPLOAD: _upload, OTHER: _other}[group](rng, group)


def _generate(rng: Random, group: str) -> Sent:
    path, valid = rng.choice(list(GENERATING.items()))
    body = copy(valid)
    if rng.random() < 0.25:
        body["stream"] = rng.random() < 0.7
    way = rng.random()
    if way < 0.7:
        body["steering"] = copy(rng.choice(specs()))
    elif way < 0.82:
        body |= in_xargs(rng.choice(specs()))
    elif way < 0.9:
        body["model"] = f"{MODEL}:{HOUSE}"
    elif way < 0.96:
        body |= copy(rng.choice(foreign()))
    return _mutated(rng, Sent(group, "POST", path), body)


def _registry(rng: Random, group: str) -> Sent:
    body = copy(rng.choice(specs()))
    if rng.random() < 0.5:
        return _mutated(rng, Sent(group, "POST", VALIDATE), body)
    return _mutated(rng, Sent(group, "PUT", f"{PRESETS}/{_name(rng)}", admin=True), body)


def _upload(rng: Random, group: str) -> Sent:
    data, done, headers = rng.choice(vector_files()), [], dict(BINARY)
    if rng.random() > VALID_SHARE:
        for kind in rng.choices(list(FILE), k=rng.choice((1, 1, 2))):
            data = FILE[kind](rng, data)
            done.append(kind)
    if rng.random() < 0.1:
        kind = rng.choice(list(HEADERS))
        data, more = HEADERS[kind](rng, data)
        headers |= more
        done.append(kind)
    return Sent(group, "PUT", f"{VECTORS}/{_name(rng)}", data, headers, tuple(done), admin=True)


def _other(rng: Random, group: str) -> Sent:
    kind = rng.choice(("read", "read", "delete", "post", "method"))
    if kind == "post":
        path, body = rng.choice(list(OTHER_POSTS.items()))
        return _mutated(rng, Sent(group, "POST", path), copy(body) | {"steering": copy(rng.choice(specs()))})
    where = rng.choice((VECTORS, PRESETS))
    if kind == "delete":
        return Sent(group, "DELETE", f"{where}/{_name(rng)}", admin=True)
    if kind == "method":
        method = rng.choice(("PATCH", "OPTIONS", "HEAD", "TRACE", "POST", "BREW"))
        return Sent(group, method, rng.choice(reads()), b"{}", JSON, ("odd method",), admin=True)
    if rng.random() < 0.5:
        return Sent(group, "GET", rng.choice(reads()))
    odd = quote(rng.choice(HOSTILE_NAMES), safe="")
    path = rng.choice((f"{where}/{odd}", f"{where}?after={odd}", f"{where}?limit={odd}", f"{where}/{HOUSE}?{odd}"))
    return Sent(group, "GET", path, mutations=("odd name",))


def _name(rng: Random) -> str:
    return quote(rng.choice(HOSTILE_NAMES), safe="") if rng.random() < 0.1 else rng.choice(NAMES)


def _mutated(rng: Random, valid: Sent, body: dict[str, Any]) -> Sent:
    """`valid` with a JSON body, after up to three mutations of its tree, and perhaps of its bytes and headers."""
    kinds: list[str] = []
    headers = dict(JSON)
    tree: Any = body
    on_bytes = False
    if rng.random() > VALID_SHARE:
        on_bytes = rng.random() < 0.25
        if not on_bytes or rng.random() < 0.3:
            kinds += sorted(rng.choices(list(TREE), weights=(8, 3, 3, 3, 1, 3), k=rng.choice((1, 1, 2, 3))), key=_order)
    if kinds.count("repeat a key") > 1:  # a tree with a repeated key is not mutated further
        kinds = kinds[: kinds.index("repeat a key") + 1]
    for kind in kinds:
        tree = TREE[kind](rng, tree)
    data = dump(tree).encode("utf-8", "surrogatepass")
    if on_bytes:
        kind = rng.choice((*ENCODED, *HEADERS))
        if kind in ENCODED:
            data = ENCODED[kind](rng, data)
        else:
            data, more = HEADERS[kind](rng, data)
            headers |= more
        kinds.append(kind)
    return Sent(valid.group, valid.method, valid.path, data, headers, tuple(kinds), valid.admin)


_ORDER = {kind: place for place, kind in enumerate(TREE)}


def _order(kind: str) -> int:
    return _ORDER[kind]
