"""Wrong keys open nothing, in whatever form they come."""

from __future__ import annotations

import pytest
from helpers.attack import PRESETS, VECTORS, quiet, refusal, send
from helpers.living import ADMIN, INFERENCE, along
from helpers.server_process import Server

from steer_engine.vectors.safetensors_format import to_bytes

WRONG = {
    "none": {},
    "wrong": {"Authorization": "Bearer not-a-key-of-this-server"},
    "empty": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": INFERENCE},
    "basic": {"Authorization": f"Basic {INFERENCE}"},
    "shorter": {"Authorization": f"Bearer {INFERENCE[:-1]}"},
    "longer": {"Authorization": f"Bearer {INFERENCE}x"},
    "in capitals": {"Authorization": f"Bearer {INFERENCE.upper()}"},
    "both": {"Authorization": f"Bearer {INFERENCE} {ADMIN}"},
    "long": {"Authorization": "Bearer " + "k" * 10_000},
    "not ascii": {"Authorization": "Bearer \xff\xfe"},
}
WRONG_ADMIN = {
    "none": {},
    "wrong": {"X-Steering-Admin-Key": "wrong"},
    "empty": {"X-Steering-Admin-Key": ""},
    "the inference key": {"X-Steering-Admin-Key": INFERENCE},
    "shorter": {"X-Steering-Admin-Key": ADMIN[:-1]},
    "a list": {"X-Steering-Admin-Key": f"{ADMIN},{ADMIN}"},
    "not ascii": {"X-Steering-Admin-Key": "\xe9" * 30},
}
PATHS = ("/v1/steering", VECTORS, f"{VECTORS}/house", PRESETS, "/v1/steering/stats", "/v1/models")


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_nothing_is_read_without_a_key(living: Server, headers: dict[str, str]) -> None:
    for path in PATHS:
        answer = send(living, "GET", path, headers=_encoded(headers), key={})
        assert answer.status_code == 401, path
        quiet(answer.text, headers.get("Authorization", ""))


@pytest.mark.parametrize("headers", WRONG_ADMIN.values(), ids=WRONG_ADMIN)
@pytest.mark.parametrize("path", [f"{VECTORS}/mine", f"{PRESETS}/mine"])
def test_nothing_is_changed_without_an_admin_key(living: Server, path: str, headers: dict[str, str]) -> None:
    user = {"Authorization": f"Bearer {INFERENCE}"}
    for method in ("PUT", "DELETE"):
        answer = send(living, method, path, to_bytes(along(1)), _encoded(headers), key=user)
        refusal(answer, headers.get("X-Steering-Admin-Key", ""), status=401)
        assert send(living, method, path, to_bytes(along(1)), _encoded(headers), key={}).status_code == 401


def test_a_key_in_the_address_is_no_key(living: Server) -> None:
    for query in (f"?api_key={INFERENCE}", f"?key={ADMIN}", f"?Authorization=Bearer%20{ADMIN}"):
        assert send(living, "GET", VECTORS + query, key={}).status_code == 401
        assert send(living, "DELETE", f"{VECTORS}/house{query}", key={}).status_code == 401


def test_a_path_in_another_spelling_needs_the_key_too(living: Server) -> None:
    for path in (
        "/v1//steering",
        "//v1/steering",
        "/V1/steering",
        "/v1/steering/",
        "/v1/./steering",
        "/x/../v1/steering",
    ):
        answer = send(living, "GET", path, key={})
        assert answer.status_code in (401, 404, 307), (path, answer.status_code)
        assert "hidden_size" not in answer.text


def _encoded(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode("latin-1") for name, value in headers.items()}
