"""Our own routes: readiness, the server's description, its vectors, and what the log says of a bad file."""

from __future__ import annotations

from helpers.asking import MODEL
from helpers.server_process import Server

import steer_engine
from steer_engine.vectors import ControlVector


def test_ready(server: Server) -> None:
    answer = server.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"


def test_description(server: Server) -> None:
    facts = server.get("/v1/steering").json()
    assert facts["version"] == steer_engine.__version__
    assert facts["model"] == MODEL
    assert facts["hidden_size"] == 576
    assert facts["num_blocks"] == 30
    assert facts["armed_blocks"] == list(range(30))
    assert facts["sites"] == ["block"]
    assert "add" in facts["operations"]
    assert facts["limits"]["max_abs_scale"] > 0
    assert facts["limits"]["rows"] == 4


def test_vectors_are_listed_by_name_and_paged(server: Server, vectors: dict[str, ControlVector]) -> None:
    expected = [{"name": name, "digest": vectors[name].digest} for name in sorted(vectors)]
    whole = server.get("/v1/steering/vectors").json()
    assert whole == {"object": "list", "data": expected, "has_more": False}
    first = server.get("/v1/steering/vectors?limit=1").json()
    assert (first["data"], first["has_more"]) == (expected[:1], True)
    rest = server.get(f"/v1/steering/vectors?after={expected[0]['name']}").json()
    assert (rest["data"], rest["has_more"]) == (expected[1:], False)
    assert server.get("/v1/steering/vectors?limit=0").status_code == 400


def test_one_vector(server: Server, vectors: dict[str, ControlVector]) -> None:
    answer = server.get("/v1/steering/vectors/east")
    shown = answer.json()
    assert answer.headers["ETag"] == f'"{vectors["east"].digest}"'
    assert (shown["name"], shown["digest"]) == ("east", vectors["east"].digest)
    assert (shown["blocks"], shown["hidden_size"]) == (list(range(8, 22)), 576)
    by_digest = server.get(f"/v1/steering/vectors/{vectors['east'].digest}").json()
    assert by_digest == {key: value for key, value in shown.items() if key != "name"}
    missing = server.get("/v1/steering/vectors/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "vector"


def test_a_broken_file_is_named_in_the_log_and_left_out(server: Server) -> None:
    assert "broken.safetensors" in server.log
    assert "notes.txt" not in server.log
    answer = server.get("/v1/steering/vectors/broken")
    assert answer.status_code == 404


def test_a_file_that_comes_later_is_found(server: Server, vectors_dir, vectors) -> None:  # type: ignore[no-untyped-def]
    from steer_engine.vectors import save

    assert server.get("/v1/steering/vectors/later").status_code == 404
    save(vectors["east"], vectors_dir / "later.safetensors")
    assert server.get("/v1/steering/vectors/later").json()["digest"] == vectors["east"].digest
    (vectors_dir / "later.safetensors").unlink()
    assert server.get("/v1/steering/vectors/later").status_code == 404
