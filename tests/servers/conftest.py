"""One armed server on the real 135M model for the whole suite, and the vectors it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.asking import STRONG
from helpers.living import ADMIN, INFERENCE, along
from helpers.otlp_receiver import OtlpReceiver
from helpers.server_process import Server, steer_engine_serve

from steer_engine.probe import Platt
from steer_engine.vectors import ControlVector, VectorMetadata, save
from steer_engine.vectors.metadata import FittedProbe, ProbeBlock
from steer_engine.vectors.safetensors_format import to_bytes

NUM_BLOCKS, HIDDEN_SIZE = 30, 576
BLOCKS = range(8, 22)


def random_vector(seed: int, *, hidden_size: int = HIDDEN_SIZE) -> ControlVector:
    """Random directions of norm 1 at BLOCKS."""
    rng = np.random.default_rng(seed)
    directions = {}
    for block in BLOCKS:
        direction = rng.standard_normal(hidden_size)
        directions[block] = (direction / np.linalg.norm(direction)).astype(np.float32)
    return ControlVector(directions=directions, metadata=VectorMetadata(notes=f"random, seed {seed}"))


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ControlVector]:
    """Name -> vector, as the server's folder has them; `narrow` is for another model."""
    return {
        "east": random_vector(1),
        "west": random_vector(2),
        "narrow": random_vector(3, hidden_size=64),
    }


@pytest.fixture(scope="session")
def vectors_dir(vectors: dict[str, ControlVector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for name, vector in vectors.items():
        save(vector, folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no header")
    (folder / "loud.preset.json").write_text(json.dumps(STRONG))
    (folder / "misfit.preset.json").write_text(json.dumps({"edits": [{"vector": "narrow"}]}))
    (folder / "notes.txt").write_text("not a vector, and not meant to be one")
    return folder


@pytest.fixture(scope="session")
def server(smollm2: str, vectors_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`steer-engine serve smollm2-135m`, with as many of vLLM's routes as it has."""
    del smollm2  # converted by now: the server's own start is what takes the time
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = steer_engine_serve(
        "smollm2-135m",
        "--steering-vectors",
        str(vectors_dir),
        "--enable-scale-out",
        "--enable-prompt-tokens-details",
        "--verbose",
    )
    running = Server(command, log, env={"VLLM_SERVER_DEV_MODE": "1"})
    yield running
    running.kill()


@pytest.fixture(scope="session")
def monitored(
    smollm2: str, vectors: dict[str, ControlVector], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that watches all traffic: a cosine at two blocks, a dot product, and a trained probe's probability."""
    del smollm2
    folder = tmp_path_factory.mktemp("monitored")
    for name in ("east", "west"):
        save(vectors[name], folder / f"{name}.safetensors")
    blocks = {11: ProbeBlock(auroc=0.7), 12: ProbeBlock(auroc=0.9, threshold=1.0, platt=Platt(0.2, -0.1))}
    trained = VectorMetadata(probe=FittedProbe(blocks=blocks, at="every_prompt_token"))
    save(ControlVector(directions=random_vector(4).directions, metadata=trained), folder / "trained.safetensors")
    command = steer_engine_serve(
        "smollm2-135m", "--steering-vectors", str(folder), "--enable-scale-out", "--enable-prompt-tokens-details",
        "--steering-monitor", "west:10-11:above=0.01", "--steering-monitor=push=east:14:dot:above=-1.5",
        "--steering_monitor", "trained",
    )  # fmt: skip
    running = Server(command, folder / "server.log")
    yield running
    running.kill()


@pytest.fixture(scope="session")
def traces() -> Iterator[OtlpReceiver]:
    """What the living server says of its requests by OpenTelemetry."""
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the living server mirrors, looked at every second: one vector, `reflected`."""
    folder = tmp_path_factory.mktemp("mirrored")
    (folder / "reflected.safetensors").write_bytes(to_bytes(along(15)))
    return folder


@pytest.fixture(scope="session")
def living(
    tiny_llama: str, traces: OtlpReceiver, mirrored: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """With keys, a default preset, traces, a log of requests, a mirror, and a registry that changes.

    The last test of test_living_server ends it: who else needs it lives in attacks/ or in
    test_features_and_ranks.py, which run before.
    """
    folder = tmp_path_factory.mktemp("living")
    vectors = folder / "vectors"
    vectors.mkdir()
    (vectors / "house.safetensors").write_bytes(to_bytes(along(5)))
    (vectors / "house.preset.json").write_text(json.dumps({"edits": [{"vector": "house"}]}))
    command = steer_engine_serve(
        tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(vectors),
        "--steering-default", "house", "--api-key", INFERENCE, "--shutdown-timeout", "20",
        "--steering-mirror", f"file://{mirrored}", "--steering-mirror-seconds", "1",
        "--otlp-traces-endpoint", traces.endpoint, "--enable-log-requests",
    )  # fmt: skip
    running = Server(command, folder / "server.log", env={"STEER_ENGINE_ADMIN_KEYS": ADMIN, **traces.environment})
    yield running
    running.kill()
