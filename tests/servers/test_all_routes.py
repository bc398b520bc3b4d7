"""No route drops steering: each POST route of the real app carries it (tested elsewhere) or refuses it."""

from __future__ import annotations

import re

from helpers.asking import CARRYING, MODEL, STRONG
from helpers.server_process import Server

from steer_engine.api.middleware import CARRYING_PATHS, OWN_PREFIX

WITH_BODIES = {"POST", "PUT", "PATCH", "DELETE"}


def routes(server: Server) -> dict[str, set[str]]:
    """Path -> methods, as the server lists them at its start."""
    found: dict[str, set[str]] = {}
    for path, methods in re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.log):
        found.setdefault(path, set()).update(methods.strip().split(", "))
    return found


def concrete(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


def test_the_walk_sees_the_app(server: Server) -> None:
    found = routes(server)
    assert len(found) > 40
    assert set(found) >= CARRYING_PATHS
    assert {"/tokenize", "/inference/v1/generate", "/v1/completions/render", "/v1/messages/count_tokens"} <= set(found)
    assert {"/readyz", "/v1/steering", "/v1/steering/vectors"} <= set(found)


def test_every_other_route_refuses_steering(server: Server) -> None:
    walked = [
        (method, path)
        for path, methods in routes(server).items()
        for method in sorted(methods & WITH_BODIES)
        if path not in CARRYING_PATHS and not path.startswith(OWN_PREFIX)
    ]
    assert len(walked) > 20
    body = {"model": MODEL, "prompt": "x", "input": "x", "messages": [], "steering": STRONG}
    for method, path in walked:
        answer = server.request(method, concrete(path), body)
        assert answer.status_code == 400, (method, path, answer.text)
        assert answer.json()["error"]["param"] == "steering", (method, path, answer.text)


def test_a_model_served_elsewhere_in_the_app_is_not_hindered(server: Server) -> None:
    """The words of a prompt are not steering."""
    text = 'say {"steering": 1}'
    assert server.post("/tokenize", {"model": MODEL, "prompt": text}).status_code == 200
    answer = CARRYING["/v1/completions"].ask(server, prompt=text)
    assert answer.status_code == 200
    assert "X-Steering" not in answer.headers
