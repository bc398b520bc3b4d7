"""Requests made up from our own OpenAPI page, as it says and as it forbids: whatever comes, never a 500."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from helpers.living import OPERATOR
from helpers.server_process import Server
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from steer_engine.api.middleware import OWN_PREFIX

OPERATIONS = {
    f"{method} {path}"
    for path, methods in {
        "/readyz": ["GET"],
        OWN_PREFIX: ["GET"],
        f"{OWN_PREFIX}/stats": ["GET"],
        f"{OWN_PREFIX}/validate": ["POST"],
        f"{OWN_PREFIX}/vectors": ["GET"],
        f"{OWN_PREFIX}/vectors/{{name}}": ["GET", "PUT", "DELETE"],
        f"{OWN_PREFIX}/presets": ["GET"],
        f"{OWN_PREFIX}/presets/{{name}}": ["GET", "PUT", "DELETE"],
    }.items()
    for method in methods
}
PLAIN = {"GET /readyz", f"GET {OWN_PREFIX}", f"GET {OWN_PREFIX}/stats"}


def operations(server: Server) -> dict[str, Any]:
    page = server.get("/openapi.json").json()
    page["paths"] = {
        path: methods for path, methods in page["paths"].items() if path == "/readyz" or path.startswith(OWN_PREFIX)
    }
    schema = schemathesis.openapi.from_dict(page)
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{each.method.upper()} {each.path}": each for each in found}


@pytest.fixture(scope="module")
def routes(living: Server) -> dict[str, Any]:
    return operations(living)


def test_the_page_has_every_route(routes: dict[str, Any]) -> None:
    assert set(routes) == OPERATIONS


MODES = [
    pytest.param(operation, mode, id=f"{operation}, {'as it says' if mode is GenerationMode.POSITIVE else 'otherwise'}")
    for operation in sorted(OPERATIONS)
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # Without a parameter or a body nothing can be otherwise.
    if mode is GenerationMode.POSITIVE or operation not in PLAIN
]


@pytest.mark.parametrize(("operation", "mode"), MODES)
@pytest.mark.parametrize("examples", [5, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"])
def test_no_request_is_an_error_of_the_server(
    living: Server, routes: dict[str, Any], operation: str, mode: GenerationMode, examples: int
) -> None:
    statuses: Counter[int] = Counter()
    strategy = routes[operation].as_strategy(generation_mode=mode)

    with requests.Session() as session:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def check(case: Any) -> None:
            answer = case.call(base_url=living.url, headers=OPERATOR, session=session, timeout=60)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (answer.request.url, answer.request.body, answer.text)

        check()
    assert statuses
