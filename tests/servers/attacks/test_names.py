"""Names that are paths, too long, or look like others: refused, and never a file of that name."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers.attack import PRESETS, VECTORS, ask, quiet, refusal, send
from helpers.living import USER, along
from helpers.server_process import Server

from steer_engine.vectors.safetensors_format import to_bytes

NAMES = {
    "parent": "..",
    "parent of a parent": "../..",
    "absolute": "/etc/passwd",
    "inside": "../vectors/house",
    "backslash": "..\\house",
    "slash": "a/b",
    "NUL": "house\0.safetensors",
    "newline": "house\nhouse",
    "space": " house",
    "dot first": ".house",
    "dash first": "-house",
    "10 kB": "x" * 10_000,
    "129 characters": "x" * 129,
    "composed": "\u00e9t\u00e9",
    "decomposed": "e\u0301te\u0301",
    "fullwidth": "\uff48ouse",
    "Cyrillic look-alike": "h\u043euse",
    "right to left": "\u202eesuoh",
    "zero width": "hou\u200bse",
    "emoji": "\U0001f642",
    "digest": "sha256:" + "0" * 64,
    "url": "http://example.org/v.safetensors",
    "file url": "file:///etc/passwd",
    "wildcard": "*",
    "format": "{0.__class__}%s$HOME",
    "markup": "<script>alert(1)</script>",
}
names = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def spellings(name: str) -> list[str]:
    """In a path: percent-encoded once, twice, and with every byte encoded."""
    once = quote(name, safe="")
    return [once, quote(once, safe=""), "".join(f"%{byte:02x}" for byte in name.encode())]


@names
@pytest.mark.parametrize("where", [VECTORS, PRESETS])
def test_no_name_like_this_is_taken(living: Server, where: str, name: str) -> None:
    body = to_bytes(along(3)) if where == VECTORS else b'{"edits": [{"vector": "house"}]}'
    before = files(living)
    for spelled in spellings(name):
        for method, content in (("PUT", body), ("DELETE", b""), ("GET", b"")):
            answer = send(living, method, f"{where}/{spelled}", content)
            if method == "GET" and name in (".", "..") and answer.status_code == 200:
                continue
            assert 400 <= answer.status_code < 500, (method, spelled[:100], answer.status_code, answer.text[:500])
            quiet(answer.text, name)
    assert files(living) == before


@names
def test_no_name_like_this_is_looked_up(living: Server, name: str) -> None:
    for requested in ({"edits": [{"vector": name}]}, {"preset": name}):
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1, "steering": requested}).encode()
        error = refusal(ask(living, body), name)
        assert error["param"] in ("steering.edits[0].vector", "steering.preset")
        checked = send(living, "POST", "/v1/steering/validate", json.dumps(requested).encode(), key=USER)
        refusal(checked, name)
    by_model = json.dumps({"model": f"tiny:{name}", "prompt": "a", "max_tokens": 1}).encode()
    refusal(ask(living, by_model), name, status=404)


@names
def test_no_page_begins_after_a_name_that_harms(living: Server, name: str) -> None:
    answer = send(living, "GET", f"{VECTORS}?after={quote(name, safe='')}", key=USER)
    assert answer.status_code == 200
    assert {entry["name"] for entry in answer.json()["data"]} <= {"house", "reflected"}


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "99999999999999999999", "x", "1e3", "", "NaN"])
def test_a_page_has_a_size(living: Server, limit: str) -> None:
    for where in (VECTORS, PRESETS):
        answer = send(living, "GET", f"{where}?limit={limit}", key=USER)
        assert 400 <= answer.status_code < 500
        quiet(answer.text)


def files(server: Server) -> list[Path]:
    return sorted(path for path in server.log_path.parent.rglob("*") if "incoming" not in path.parts)
