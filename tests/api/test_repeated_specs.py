"""A server resolves a spec that comes again from what it kept, and sees every change of the registry at once."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.registry_app import frontend_of

from steer_engine.api.frontend import Frontend
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.resolve import ResolvedSpec
from steer_engine.vectors import ControlVector, Registry, VectorMetadata
from steer_engine.vectors.safetensors_format import to_bytes

SPEC: dict[str, Any] = {"edits": [{"vector": "mood", "blocks": 1}]}


def vector(seed: int, norm: float = 4.0) -> ControlVector:
    rows = np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32)
    return ControlVector(directions=dict(enumerate(rows)), metadata=VectorMetadata(residual_norms={1: norm}))


@pytest.fixture
def frontend(tmp_path: Path) -> Frontend:
    frontend = frontend_of(Registry(tmp_path))
    frontend.registry.put("mood", vector(0))
    return frontend


def resolved(frontend: Frontend, spec: dict[str, Any]) -> ResolvedSpec:
    found = frontend.resolve(spec)
    assert found is not None
    return found


def test_what_comes_again_is_kept_until_the_name_stands_for_another_vector(frontend: Frontend) -> None:
    first = resolved(frontend, SPEC)
    assert resolved(frontend, {"edits": [dict(SPEC["edits"][0])]}) is first
    frontend.registry.put("mood", vector(1), if_match="*")
    second = resolved(frontend, SPEC)
    assert second.vectors.keys() == {vector(1).digest} != first.vectors.keys()


def test_a_change_of_metadata_is_seen(frontend: Frontend) -> None:
    spec = {"edits": [{"vector": "mood", "blocks": 1, "unit": "residual", "scale": 0.1}]}
    first = resolved(frontend, spec)
    frontend.registry.put("mood", vector(0, norm=8.0), if_match="*")
    assert resolved(frontend, spec).digest != first.digest


def test_a_deleted_vector_is_refused(frontend: Frontend) -> None:
    resolved(frontend, SPEC)
    frontend.registry.delete("mood")
    with pytest.raises(UnknownVectorError) as caught:
        frontend.resolve(SPEC)
    assert caught.value.param == "steering.edits[0].vector"


def test_a_changed_preset_is_seen(frontend: Frontend) -> None:
    frontend.registry.put_preset("calm", SPEC)
    first = resolved(frontend, {"preset": "calm"})
    assert resolved(frontend, {"preset": "calm"}).digest == first.digest
    frontend.registry.put_preset("calm", {"edits": [{**SPEC["edits"][0], "scale": -1.0}]}, if_match="*")
    assert resolved(frontend, {"preset": "calm"}).digest != first.digest


def test_vectors_inside_requests_are_not_kept(frontend: Frontend) -> None:
    inline = {"data": base64.b64encode(to_bytes(vector(2))).decode()}
    spec = {"edits": [{"vector": inline, "blocks": 1}]}
    assert resolved(frontend, spec) is not resolved(frontend, spec)
    assert not frontend._repeated._kept


def test_each_capture_is_one_of_its_own(frontend: Frontend) -> None:
    model = replace(frontend.model, capture_blocks=(0, 1))
    frontend = frontend_of(frontend.registry, model)
    spec = SPEC | {"capture": {}}
    first, second = (frontend.resolve(spec, can_capture=True) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.capture != second.capture
    with pytest.raises(SteeringRequestError):
        frontend.resolve(spec)
