"""Vectors and presets over HTTP, on a real registry. The engine is stood in for by its model's shape."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from helpers.gguf_files import write_gguf
from helpers.registry_app import ADMIN, KEY, app_of

from steer_engine.api.routing import HEADER, AdminKeys
from steer_engine.settings import ADMIN_KEYS_ENV, ApiLimits, EngineLimits, Limits, NamedLimits, RegistryLimits
from steer_engine.vectors import ControlVector, Registry, RowSet, VectorMetadata, row_set_format, save
from steer_engine.vectors.metadata import FittedCondition, FittedProbe
from steer_engine.vectors.safetensors_format import from_bytes, to_bytes
from steer_engine.vocabulary import Tags, Vocabulary


def one(value: float, *, width: int = 8, block: int = 1) -> ControlVector:
    metadata = VectorMetadata(residual_norms={block: 10.0}, notes="a test's")
    return ControlVector(directions={block: np.full(width, value, np.float32)}, metadata=metadata)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "vectors").mkdir()
    return Registry(tmp_path / "vectors", limits=RegistryLimits(max_vectors=3, max_presets=2, max_preset_bytes=1000))


@pytest.fixture
def app(registry: Registry) -> FastAPI:
    return app_of(registry, AdminKeys([KEY]), ApiLimits(max_upload_bytes=10_000, max_uploads=2))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        yield client


async def put(client: httpx.AsyncClient, name: str, data: bytes, **headers: str) -> httpx.Response:
    extra = {key.replace("_", "-"): value for key, value in headers.items()}
    return await client.put(f"/v1/steering/vectors/{name}", content=data, headers=ADMIN | extra)


def error(answer: httpx.Response) -> tuple[int, str | None]:
    body = answer.json()["error"]
    assert body["code"] == answer.status_code
    assert body["message"]
    return answer.status_code, body["param"]


@pytest.mark.parametrize("kind", ["vectors", "presets"])
async def test_lists_are_sorted_and_paged(client: httpx.AsyncClient, kind: str) -> None:
    vector = one(1)
    for name in ("b", "a"):
        await put(client, name, to_bytes(vector))
        preset = {"edits": [{"vector": name}]}
        assert (await client.put(f"/v1/steering/presets/{name}", json=preset, headers=ADMIN)).status_code == 201
    whole = (await client.get(f"/v1/steering/{kind}")).json()
    assert ([entry["name"] for entry in whole["data"]], whole["has_more"]) == (["a", "b"], False)
    for entry in whole["data"]:
        shown = (await client.get(f"/v1/steering/{kind}/{entry['name']}")).json()
        assert set(entry) == ({"name", "digest"} if kind == "vectors" else {"name", "digest", "spec"})
        assert entry == {key: shown[key] for key in entry}
    first = (await client.get(f"/v1/steering/{kind}?limit=1")).json()
    assert first == {"object": "list", "data": whole["data"][:1], "has_more": True}
    rest = (await client.get(f"/v1/steering/{kind}?limit=1&after=a")).json()
    assert rest == {"object": "list", "data": whole["data"][1:], "has_more": False}
    assert (await client.get(f"/v1/steering/{kind}?limit=1001")).status_code == 400


async def test_each_name_answers_with_its_own_metadata(client: httpx.AsyncClient) -> None:
    notes = {"mine": "from my data", "theirs": "from their data, and longer"}
    for name, text in notes.items():
        assert (await put(client, name, to_bytes(one(1).with_metadata(notes=text)))).json()["notes"] == text
    for name, text in notes.items():
        assert (await client.get(f"/v1/steering/vectors/{name}")).json()["notes"] == text
        file = await client.get(f"/v1/steering/vectors/{name}?download")
        assert from_bytes(file.content).metadata.notes == text
    newer = await put(client, "mine", to_bytes(one(1).with_metadata(notes="newer")))
    assert (newer.status_code, newer.json()["notes"]) == (200, "newer")
    assert (await client.get("/v1/steering/vectors/mine")).json()["notes"] == "newer"
    assert (await client.get("/v1/steering/vectors/theirs")).json()["notes"] == notes["theirs"]


async def test_a_fitted_condition_is_shown_and_stays_in_the_file(client: httpx.AsyncClient) -> None:
    fields = {"blocks": [1], "measure": "cosine", "at": "max_prompt", "below": 0.5, "f1": 0.875}
    condition = FittedCondition(**fields)  # type: ignore[arg-type]
    shown = (await put(client, "detector", to_bytes(one(1).with_metadata(condition=condition)))).json()
    assert shown["condition"] == {**fields, "held_out": {}, "chat": False}
    assert (await client.get("/v1/steering/vectors/detector")).json() == shown
    assert shown["digest"] == one(1).digest
    file = await client.get("/v1/steering/vectors/detector?download")
    assert from_bytes(file.content).metadata.condition == condition
    assert (await put(client, "plain", to_bytes(one(2)))).json()["condition"] is None


async def test_a_trained_probe_is_shown_and_stays_in_the_file(client: httpx.AsyncClient) -> None:
    blocks = {"1": {"auroc": 0.9375, "threshold": 0.5, "platt": {"a": 2.0, "b": -1.0}}}
    probe = FittedProbe.model_validate({"blocks": blocks, "at": "mean_prompt"})
    shown = (await put(client, "detector", to_bytes(one(1).with_metadata(probe=probe)))).json()
    assert shown["probe"] == {"blocks": blocks, "at": "mean_prompt", "held_out": {}, "chat": False}
    assert shown["digest"] == one(1).digest
    file = await client.get("/v1/steering/vectors/detector?download")
    assert from_bytes(file.content).metadata.probe == probe
    assert (await put(client, "plain", to_bytes(one(2)))).json()["probe"] is None


async def test_a_long_precondition_is_not_repeated(client: httpx.AsyncClient) -> None:
    await put(client, "calm", to_bytes(one(1)))
    refused = await put(client, "calm", to_bytes(one(2)), If_Match="x" * 5000)
    assert refused.status_code == 412
    assert len(refused.text) < 400


async def test_a_file_for_another_operation_is_refused(client: httpx.AsyncClient, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"glp.mode": "project", "glp.alpha_default": 4.0})
    refused = await put(client, "calm", path.read_bytes())
    assert refused.status_code == 400
    assert "made for op 'ablate' with scale 4" in refused.json()["error"]["message"]


async def test_put_show_download_and_delete(client: httpx.AsyncClient) -> None:
    vector = one(1)
    created = await put(client, "calm", to_bytes(vector))
    assert created.status_code == 201
    assert created.headers["ETag"] == f'"{vector.digest}"'
    assert created.json()["digest"] == vector.digest
    assert (await put(client, "calm", to_bytes(vector))).status_code == 200
    shown = (await client.get("/v1/steering/vectors/calm")).json()
    assert shown == created.json()
    assert shown["residual_norms"] == {"1": 10.0}
    for name in ("calm", vector.digest):
        file = await client.get(f"/v1/steering/vectors/{name}?download")
        assert from_bytes(file.content) == vector
        assert file.headers["ETag"] == f'"{vector.digest}"'
    listed = (await client.get("/v1/steering/vectors")).json()
    assert listed["data"] == [{"name": "calm", "digest": vector.digest}]
    deleted = await client.delete("/v1/steering/vectors/calm", headers=ADMIN)
    assert deleted.json() == {"name": "calm", "digest": vector.digest, "in_flight": 0}
    assert error(await client.get("/v1/steering/vectors/calm")) == (404, "vector")
    assert error(await client.delete("/v1/steering/vectors/calm", headers=ADMIN))[0] == 404


async def test_a_row_set_is_put_shown_downloaded_and_not_taken_for_a_vector(client: httpx.AsyncClient) -> None:
    read = np.eye(8, dtype=np.float32)[:2]
    numbers = {1: np.array([7, 4099])}
    rows = RowSet(kind="features", read={1: read}, write={1: read}, indices=numbers, labels={1: {7: "praise"}})
    created = await put(client, "praise", row_set_format.to_bytes(rows))
    assert created.status_code == 201
    shown = (await client.get("/v1/steering/vectors/praise")).json()
    assert shown == created.json()
    assert (shown["kind"], shown["rows"], shown["labels"]) == ("features", {"1": [7, 4099]}, {"1": {"7": "praise"}})
    assert shown["digest"] == rows.digest
    file = await client.get("/v1/steering/vectors/praise?download")
    assert row_set_format.from_bytes(file.content) == rows
    listed = (await client.get("/v1/steering/vectors")).json()
    assert listed["data"] == [{"name": "praise", "digest": rows.digest}]
    refused = await client.put("/v1/steering/presets/p", json={"edits": [{"vector": "praise"}]}, headers=ADMIN)
    assert refused.status_code == 422
    assert "is a set of features, not a control vector" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "steering.edits[0].vector"
    wide = RowSet(kind="features", read={1: np.ones((1, 9), np.float32)}, write={1: np.ones((1, 9), np.float32)})
    assert (await put(client, "wide", row_set_format.to_bytes(wide))).status_code == 422
    zero = RowSet(kind="features", read={1: read}, write={1: 0 * read})
    assert (await put(client, "zero", row_set_format.to_bytes(zero))).status_code == 422


async def test_a_file_is_taken_as_curl_sends_it(client: httpx.AsyncClient) -> None:
    sent = await put(client, "calm", to_bytes(one(1)), content_type="application/x-www-form-urlencoded")
    assert sent.status_code == 201


async def test_gguf_is_taken_too(client: httpx.AsyncClient, tmp_path: Path, registry: Registry) -> None:
    save(one(2), tmp_path / "v.gguf")
    data = (tmp_path / "v.gguf").read_bytes()
    assert data.startswith(b"GGUF")
    assert (await put(client, "calm", data)).status_code == 201
    assert np.array_equal(registry.get("calm").directions[1], one(2).directions[1])
    broken = await put(client, "broken", data[:100])
    assert error(broken)[0] == 400
    assert str(tmp_path) not in broken.text


async def test_replacing_needs_the_digest_that_is_there(client: httpx.AsyncClient) -> None:
    first, second = one(1), one(2)
    assert error(await put(client, "calm", to_bytes(first), if_match=first.digest))[0] == 412
    await put(client, "calm", to_bytes(first))
    assert error(await put(client, "calm", to_bytes(second)))[0] == 409
    assert error(await put(client, "calm", to_bytes(second), if_match=f'"{second.digest}"'))[0] == 412
    assert (await put(client, "calm", to_bytes(second), if_match=f'"{first.digest}"')).status_code == 200
    assert (await client.get("/v1/steering/vectors/calm")).json()["digest"] == second.digest
    stale = await client.delete("/v1/steering/vectors/calm", headers=ADMIN | {"If-Match": first.digest})
    assert error(stale)[0] == 412


@pytest.mark.parametrize("path", ["vectors/calm", "presets/calm"])
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_changes_need_the_admin_key(client: httpx.AsyncClient, method: str, path: str) -> None:
    for headers in ({}, {HEADER: "wrong"}, {"Authorization": "Bearer wrong"}):
        answer = await client.request(method, f"/v1/steering/{path}", content=to_bytes(one(1)), headers=headers)
        assert error(answer)[0] == 401
        assert "WWW-Authenticate" in answer.headers


@pytest.mark.parametrize("path", ["vectors/calm", "presets/calm"])
async def test_without_a_key_changes_are_off(registry: Registry, path: str) -> None:
    app = app_of(registry, AdminKeys([]), ApiLimits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        for method in ("PUT", "DELETE"):
            answer = await client.request(method, f"/v1/steering/{path}", content=b"", headers=ADMIN)
            assert error(answer)[0] == 403
            assert ADMIN_KEYS_ENV in answer.json()["error"]["message"]


def hostile() -> dict[str, tuple[bytes, int]]:
    """Uploads that are no usable vectors, and the status of each."""
    good = to_bytes(one(1))
    (header_size,) = struct.unpack("<Q", good[:8])
    nan = good[: 8 + header_size] + struct.pack("<8f", *[float("nan")] * 8)
    zero = good[: 8 + header_size] + bytes(32)

    def with_header(header: dict[str, Any], data: bytes = bytes(32)) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def entry(start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": [8], "data_offsets": [start, end]}

    return {
        "empty": (b"", 400),
        "text": (b"hello", 400),
        "truncated": (good[:-1], 400),
        "trailing": (good + b"\0", 400),
        "header size": (struct.pack("<Q", 2**63) + good[8:], 400),
        "no header": (struct.pack("<Q", 0), 400),
        "overlap": (with_header({"direction.1": entry(0, 32), "direction.2": entry(0, 32)}), 400),
        "gap": (with_header({"direction.1": entry(32, 64)}, bytes(64)), 400),
        "beyond": (with_header({"direction.1": entry(0, 32)}, b""), 400),
        "dtype": (with_header({"direction.1": entry(0, 64, "F64")}, bytes(64)), 400),
        "foreign tensor": (with_header({"weight": entry(0, 32)}), 400),
        "million keys": (with_header({f"direction.{i}": {} for i in range(2000)}, b"")[:9_000], 400),
        "nested header": (struct.pack("<Q", 4000) + b"[" * 4000, 400),
        "nan": (nan, 422),
        "zero": (zero, 422),
        "other width": (to_bytes(one(1, width=16)), 422),
        "other depth": (to_bytes(one(1, block=9)), 422),
        "pickle": (b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins", 400),
        "gguf lies": (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62), 400),
    }


@pytest.mark.parametrize(("data", "status"), hostile().values(), ids=hostile().keys())
async def test_hostile_files(client: httpx.AsyncClient, tmp_path: Path, data: bytes, status: int) -> None:
    answer = await put(client, "calm", data)
    assert error(answer)[0] == status, answer.text
    assert str(tmp_path) not in answer.text
    assert len(answer.text) < 1000
    assert (await client.get("/v1/steering/vectors")).json()["data"] == []
    assert list((tmp_path / "vectors" / ".steer-engine" / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "status"),
    [("..", 404), ("%2e%2e", 400), ("a%2Fb", 404), ("a%00b", 400), ("-a", 400), ("%C3%A9", 400), ("e%CC%81", 400),
     ("x" * 10_000, 400), ("a%20b", 400), ("%F0%9F%99%82", 400), ("a%0Ab", 400), ("sha256:" + "0" * 64, 400)],
)  # fmt: skip
async def test_hostile_names(client: httpx.AsyncClient, tmp_path: Path, name: str, status: int) -> None:
    answer = await put(client, name, to_bytes(one(1)))
    assert answer.status_code in (status, 405), answer.text
    assert len(answer.text) < 1000
    shown = await client.get(f"/v1/steering/vectors/{name}")
    assert shown.status_code == 404 or name in ("..", "%2e%2e")
    assert [path.name for path in tmp_path.rglob("*")] == ["vectors"]


async def test_limits_of_size_and_number(client: httpx.AsyncClient) -> None:
    assert error(await put(client, "large", bytes(10_001)))[0] == 413

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    uncounted = await client.put("/v1/steering/vectors/large", content=endless(), headers=ADMIN)
    assert error(uncounted)[0] == 413
    assert error(await put(client, "large", b"{}", content_type="application/json"))[0] == 415
    for i in range(3):
        assert (await put(client, f"v{i}", to_bytes(one(i + 1)))).status_code == 201
    assert error(await put(client, "v3", to_bytes(one(9))))[0] == 507
    assert (await put(client, "v0", to_bytes(one(7)), if_match="*")).status_code == 200


async def test_uploads_at_once_are_bounded(client: httpx.AsyncClient) -> None:
    release = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        await release.wait()
        yield to_bytes(one(1))

    waiting = [
        asyncio.create_task(client.put(f"/v1/steering/vectors/v{i}", content=slow(), headers=ADMIN)) for i in range(2)
    ]
    await asyncio.sleep(0.1)
    busy = await put(client, "third", to_bytes(one(1)))
    assert error(busy)[0] == 503
    assert int(busy.headers["Retry-After"]) >= 1
    release.set()
    assert [(await task).status_code for task in waiting] == [201, 201]
    assert (await put(client, "third", to_bytes(one(1)))).status_code == 201


async def test_presets(client: httpx.AsyncClient) -> None:
    await put(client, "calm", to_bytes(one(1)))
    spec = {"edits": [{"vector": "calm", "scale": 2.0}]}

    async def put_preset(name: str, body: Any, **headers: str) -> httpx.Response:
        extra = {key.replace("_", "-"): value for key, value in headers.items()}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.put(f"/v1/steering/presets/{name}", content=content, headers=ADMIN | extra)

    created = await put_preset("soft", spec)
    assert created.status_code == 201
    digest = created.json()["digest"]
    assert (await put_preset("soft", spec)).status_code == 200
    assert (await client.get("/v1/steering/presets/soft")).json() == {"name": "soft", "digest": digest, "spec": spec}
    assert (await client.get("/v1/steering/presets")).json()["data"] == [created.json()]
    other = {"edits": [{"vector": "calm", "scale": 3.0}]}
    assert error(await put_preset("soft", other))[0] == 409
    assert error(await put_preset("soft", other, if_match="sha256:" + "0" * 64))[0] == 412
    assert (await put_preset("soft", other, if_match=digest)).status_code == 200

    assert error(await put_preset("bad", {"edits": [{"vector": "nobody"}]})) == (422, "steering.edits[0].vector")
    assert error(await put_preset("bad", {"edits": [{"vector": "calm", "blocks": [9]}]}))[0] == 422
    assert error(await put_preset("bad", {"edits": [{"vector": "calm", "scale": "1"}]}))[0] == 400
    for body in ({"preset": "soft"}, {"edits": []}, {}, [], None, b"", b"{", b"[" * 900):
        assert error(await put_preset("bad", body))[0] == 400, body
    assert error(await put_preset("bad", b" " * 1001))[0] == 413
    inline = {"vector": {"data": base64.b64encode(to_bytes(one(8))).decode()}}
    assert (await client.post("/v1/steering/validate", json={"edits": [inline]})).status_code == 200
    passing = {"edits": [{"vector": one(8).digest}]}  # known from a request, and not for long
    assert (await client.post("/v1/steering/validate", json=passing)).status_code == 200
    assert error(await put_preset("bad", passing))[0] == 422
    assert error(await client.delete("/v1/steering/vectors/calm", headers=ADMIN))[0] == 409
    await put_preset("second", spec)
    assert error(await put_preset("third", spec))[0] == 507
    assert (await client.delete("/v1/steering/presets/soft", headers=ADMIN)).status_code == 200
    assert error(await client.get("/v1/steering/presets/soft")) == (404, "preset")
    assert error(await client.delete("/v1/steering/presets/soft", headers=ADMIN))[0] == 404


async def test_validate(client: httpx.AsyncClient) -> None:
    await put(client, "calm", to_bytes(one(1)))
    spec = {"edits": [{"vector": "calm", "scale": 2.0}]}
    answer = await client.post("/v1/steering/validate", json=spec)
    assert answer.status_code == 200
    found = answer.json()
    assert found["rows"] == 1
    assert found["dose"] == pytest.approx(2.0 * 8**0.5 / 10.0)
    assert found["edits"][0]["vector"] == one(1).digest
    bad = await client.post("/v1/steering/validate", json={"edits": [{"vector": "nobody"}]})
    assert error(bad) == (404, "steering.edits[0].vector")
    for body in (b"", b"null", b"[]", b"{" * 50_000):
        assert error(await client.post("/v1/steering/validate", content=body))[0] == 400
    assert error(await client.post("/v1/steering/validate", content=b" " * 70_000))[0] == 413


async def test_validate_reads_what_a_request_may_say(client: httpx.AsyncClient) -> None:
    """The form of another server, too: the answer is the one to a request with it."""
    await put(client, "calm", to_bytes(one(1)))
    ours = await client.post("/v1/steering/validate", json={"edits": [{"vector": "calm", "scale": 2.0}]})
    vector = {"source": "calm", "scale": 2.0, "apply": {"phases": ["prompt", "generation"]}}
    theirs = await client.post("/v1/steering/validate", json={"vectors": [vector]})
    assert theirs.status_code == 200
    assert theirs.json() == ours.json()
    path = await client.post("/v1/steering/validate", json={"vectors": [vector | {"source": "/etc/calm.gguf"}]})
    assert error(path) == (400, "steering.vectors[0].source")
    for nothing in ("null", "false"):
        assert error(await client.post("/v1/steering/validate", content=nothing)) == (400, "steering")


async def test_validate_says_when_each_edit_applies(client: httpx.AsyncClient) -> None:
    await put(client, "calm", to_bytes(one(1)))
    await put(client, "early", to_bytes(one(2, block=0)))
    holds = {"vector": "early", "above": 0.25, "at": "mean_prompt"}
    scope = {"after": [5, 6], "until": 7, "each": True, "except": {"after": 8, "tokens": 2}}
    edits = [
        {"vector": "calm", "scope": scope, "schedule": {"kind": "linear", "over": 4, "to": 0.5}},
        {
            "vector": "calm",
            "scope": {"from": "generation", "start": 2},
            "when": {"any": [holds, holds | {"below": 0.5}]},
        },
    ]
    answer = await client.post("/v1/steering/validate", json={"edits": edits})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [edit["scope"] for edit in found["edits"]] == [
        {"start": None, "end": None, **scope},
        {"start": 2, "end": None, "from": "generation"},
    ]
    assert found["edits"][0]["schedule"] == edits[0]["schedule"]
    assert found["edits"][1]["when"] == {"any": [0, 1]}
    condition = {
        "vector": one(2, block=0).digest,
        "blocks": [0],
        "measure": "cosine",
        "at": "mean_prompt",
        "above": 0.25,
    }
    assert found["conditions"] == [condition | {"below": 0.5}, condition]
    for wrong, param in (
        ({"scope": {"after": 5, "until": [5]}}, ".scope.until"),
        ({"scope": "thinking"}, ".scope"),
        ({"scope": {"after": "a"}}, ".scope.after"),
        ({"when": {"vector": "early"}}, ".when.above"),
        ({"when": {"vector": "calm", "above": 0}}, ".when.blocks"),
    ):
        bad = await client.post("/v1/steering/validate", json={"edits": [{"vector": "calm", **wrong}]})
        assert error(bad) == (400, f"steering.edits[0]{param}")
    nobody = {"edits": [{"vector": "calm"}], "when": {"vector": "nobody", "above": 0}}
    assert error(await client.post("/v1/steering/validate", json=nobody)) == (404, "steering.when.vector")


async def test_a_preset_keeps_the_vectors_of_its_conditions(client: httpx.AsyncClient) -> None:
    await put(client, "calm", to_bytes(one(1)))
    await put(client, "early", to_bytes(one(2, block=0)))
    spec: dict[str, Any] = {"edits": [{"vector": "calm"}], "when": {"all": [{"vector": "early", "above": 0.25}]}}
    url = "/v1/steering/presets/soft"
    assert (await client.put(url, json=spec, headers=ADMIN)).status_code == 201
    assert error(await client.delete("/v1/steering/vectors/early", headers=ADMIN))[0] == 409
    inline = {"vector": {"data": base64.b64encode(to_bytes(one(8, block=0))).decode()}, "above": 0.25}
    validated = await client.post("/v1/steering/validate", json=spec | {"when": inline})
    assert validated.status_code == 200
    headers = ADMIN | {"If-Match": "*"}
    assert error(await client.put(url, json=spec | {"when": inline}, headers=headers)) == (400, "edits")
    passing = {"vector": one(8, block=0).digest, "above": 0.25}  # known from a request, and not for long
    assert error(await client.put(url, json=spec | {"when": passing}, headers=headers))[0] == 422
    assert (await client.delete(url, headers=ADMIN)).status_code == 200
    assert (await client.delete("/v1/steering/vectors/early", headers=ADMIN)).status_code == 200


async def test_the_description_lists_the_scopes(client: httpx.AsyncClient, app: FastAPI) -> None:
    async def words() -> list[str]:
        scopes = (await client.get("/v1/steering")).json()["scopes"]
        return [scope for scope in scopes if isinstance(scope, str)]

    assert await words() == ["all", "prompt", "generation", "last_prompt_token"]
    frontend = app.state.steering_frontend
    frontend.vocabulary = Vocabulary(None, 100, lambda name: Tags("a", "b") if name == "thinking" else "none.")
    assert await words() == ["all", "prompt", "generation", "last_prompt_token", "thinking", "answer"]


@pytest.mark.parametrize("path", ["vectors", "presets"])
@pytest.mark.parametrize("limit", ["0", "1001", "x" * 5000, "1e3", ""])
async def test_a_wrong_parameter_is_an_error_like_any_other(client: httpx.AsyncClient, path: str, limit: str) -> None:
    answer = await client.get(f"/v1/steering/{path}", params={"limit": limit})
    assert error(answer) == (400, "limit")
    assert len(answer.text) < 300


async def test_an_unreachable_volume_is_an_error_without_its_path(client: httpx.AsyncClient, tmp_path: Path) -> None:
    await put(client, "calm", to_bytes(one(1)))
    folder = tmp_path / "vectors"
    folder.rename(tmp_path / "away")
    folder.mkdir()
    answers = [await put(client, "new", to_bytes(one(2)))]
    answers += [await client.delete("/v1/steering/vectors/calm", headers=ADMIN)]
    for answer in answers:
        assert error(answer)[0] == 503
        assert int(answer.headers["Retry-After"]) >= 1
    stats = await client.get("/v1/steering/stats")
    assert "cannot be read" in stats.json()["registry"]["fault"]
    for answer in (*answers, stats):
        assert str(tmp_path) not in answer.text
    assert (await client.get("/v1/steering/vectors/calm")).status_code == 200


async def test_draining(client: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    app.state.steering_frontend.drain.close()
    refused = [await client.get("/readyz"), await put(client, "calm", to_bytes(one(1)))]
    refused += [await client.request("DELETE", "/v1/steering/vectors/calm", headers=ADMIN)]
    for answer in refused:
        assert error(answer)[0] == 503
        assert "Retry-After" in answer.headers
    assert (await client.get("/v1/steering/vectors")).status_code == 200


async def test_limits_are_published(client: httpx.AsyncClient) -> None:
    limits = (await client.get("/v1/steering")).json()["limits"]
    groups = (Limits, ApiLimits, RegistryLimits, EngineLimits)
    assert {group.__name__ for group in groups} == {group.__name__ for group in NamedLimits.__subclasses__()}
    names = {name for group in groups for name in group.model_fields} | {
        "rows",
        "bank_rows",
        "max_edits_per_block",
    }
    assert set(limits) == names
    assert limits["max_upload_bytes"] == 10_000
    assert limits["max_vectors"] == 3
    assert limits["max_edits_per_block"] == limits["rows"] < limits["max_edits"]
