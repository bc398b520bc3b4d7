"""The calibration of an inline vector is that of its own request: a digest names directions, and no calibration."""

from __future__ import annotations

import base64
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.random_specs import MODEL, VECTORS

from steer_engine.api.frontend import Frontend
from steer_engine.errors import SteeringRequestError
from steer_engine.probe import Platt
from steer_engine.settings import SteeringConfig
from steer_engine.vectors import ControlVector, save
from steer_engine.vectors.cache import InlineVectors
from steer_engine.vectors.metadata import FittedProbe, ProbeBlock
from steer_engine.vectors.safetensors_format import to_bytes

FIRST, SECOND = Platt(1.5, -1.0), Platt(-4.0, 2.5)


def trained(platt: Platt) -> ControlVector:
    """The same directions, and so the same digest, with any calibration."""
    probe = FittedProbe(blocks={1: ProbeBlock(platt=platt)}, at="every_prompt_token")
    metadata = VECTORS["a"].metadata.model_copy(update={"probe": probe})
    return ControlVector(directions=VECTORS["a"].directions, metadata=metadata)


def inline(platt: Platt) -> dict[str, str]:
    return {"data": base64.b64encode(to_bytes(trained(platt))).decode()}


def probe(vector: Any, name: str = "p") -> dict[str, Any]:
    return {"name": name, "vector": vector, "blocks": [1], "measure": "probability"}


def calibrations(frontend: Frontend, *probes: dict[str, Any]) -> list[tuple[Platt, ...]]:
    resolved = frontend.resolve({"probes": list(probes)})
    assert resolved is not None
    assert {each.vector for each in resolved.template.probes} == {VECTORS["a"].digest}
    assert set(resolved.vectors) == {VECTORS["a"].digest}
    assert "#" not in str(resolved.report())
    return [each.platt for each in resolved.template.probes]


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Frontend:
    monkeypatch.delenv("STEER_ENGINE_VECTORS", raising=False)
    return Frontend(SteeringConfig(), MODEL)


def test_two_in_one_request_keep_their_own(frontend: Frontend) -> None:
    found = calibrations(frontend, probe(inline(FIRST), "one"), probe(inline(SECOND), "two"), probe(inline(FIRST), "3"))
    assert found == [(FIRST,), (SECOND,), (FIRST,)]


def test_a_registered_vector_with_the_same_directions_does_not_replace_it(
    frontend: Frontend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(trained(SECOND), tmp_path / "mood.safetensors")
    monkeypatch.setenv("STEER_ENGINE_VECTORS", str(tmp_path))
    frontend = Frontend(SteeringConfig(), MODEL)
    found = calibrations(frontend, probe(inline(FIRST), "own"), probe("mood", "registered"))
    assert found == [(FIRST,), (SECOND,)]


def test_requests_at_once_keep_their_own(frontend: Frontend) -> None:
    """Inline vectors are decoded in threads."""
    wrong: list[Any] = []

    def ask(platt: Platt) -> None:
        for _ in range(300):
            if (found := calibrations(frontend, probe(inline(platt)))) != [(platt,)]:
                wrong.append((platt, found))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(platt,)) for platt in (FIRST, SECOND)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_the_digest_of_an_inline_vector_brings_no_calibration(frontend: Frontend) -> None:
    """Another request may have sent it."""
    calibrations(frontend, probe(inline(FIRST)))
    digest = VECTORS["a"].digest
    resolved = frontend.resolve({"probes": [probe(digest) | {"measure": "dot"}]})
    assert resolved is not None
    with pytest.raises(SteeringRequestError, match="no calibration"):
        frontend.resolve({"probes": [probe(digest)]})


def test_a_resolved_request_keeps_its_vectors_whatever_the_cache_forgets(frontend: Frontend) -> None:
    """Many inline requests at once: the cache has room for none of their vectors until they are shipped."""
    frontend.inline = InlineVectors(frontend.limits.max_inline_bytes, budget=1)
    vectors = [VECTORS["a"] * (1.0 + number) for number in range(8)]
    specs = [{"edits": [{"vector": {"data": base64.b64encode(to_bytes(vector)).decode()}}]} for vector in vectors]
    results = [frontend.resolve(spec) for spec in specs]
    for vector, resolved in zip(vectors, results, strict=True):
        assert resolved is not None
        assert resolved.vectors == {vector.digest: vector}
        assert frontend.missing(resolved) == [vector.digest]
    assert sum(frontend.inline.find(vector.digest) is not None for vector in vectors) <= 1, (
        "the cache forgot the others"
    )
