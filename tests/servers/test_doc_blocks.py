"""The shell and Python blocks of the documentation, executed: in order, in a folder per page, with one server.

A block fails by its exit status; curl fails on an HTTP error. Requests in JSON are sent. `tests/test_docs.py` parses
all blocks, also those that do not run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.doc_blocks import ROOT, Block, all_blocks, commands, request_in
from helpers.living import ADMIN
from helpers.server_process import Server, free_port, steer_engine_serve

from steer_engine.settings import ADMIN_KEY_ENV, ADMIN_KEYS_ENV, API_KEY_ENVS, URL_ENV
from steer_engine.vectors import ControlVector, RowSet, load, row_set_format, save
from steer_engine.vectors.metadata import FittedProbe, ProbeBlock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BLOCK_SECONDS = 1100
ARMED = ("--steering-sites", "attn,mlp")
WIDTH = 576
"""Hidden size of the packaged model."""

ADDRESS = "localhost:8000"
"""Where the documentation's server listens."""

REMOTE = {"presets", "status", "vectors"}
"""Commands that talk to it."""

BLOCKS = [block for block in all_blocks() if block.runs]
QUICK_START = next(block for block in BLOCKS if block.page == "README.md" and "steer-engine serve" in block.text)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of vectors: `cheerful`, as the quick start derives it, and others that requests name."""
    folder = tmp_path_factory.mktemp("vectors")
    words = ["derive", "smollm2-135m", "--pairs", "sentiment", "--blocks", "8-19", "--dtype", "float32"]
    command = [script("steer-engine"), *words, "--out", str(folder / "cheerful.safetensors")]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cheerful = load(folder / "cheerful.safetensors")
    for name in ("sad", "medical", "toxicity"):
        save(-1 * cheerful, folder / f"{name}.safetensors")
    trained = FittedProbe(blocks={14: ProbeBlock(auroc=0.9, threshold=0.0, platt=None)}, at="every_prompt_token")
    save(cheerful.with_metadata(probe=trained), folder / "mood.safetensors")
    save_made(folder)
    return folder


def save_made(folder: Path) -> None:
    """Random vectors and rows under the names of the pages on operations."""
    rng = np.random.default_rng(0)
    for name in ("north", "east"):
        rows = {block: rng.standard_normal(WIDTH).astype(np.float32) for block in range(8, 20)}
        save(ControlVector(directions=rows), folder / f"{name}.safetensors")
    read, write = ({20: rng.standard_normal((4, WIDTH)).astype(np.float32)} for _ in range(2))
    numbers = {20: np.array([3, 10200, 10201, 10202])}
    features = RowSet(kind="features", read=read, write=write, indices=numbers)
    (folder / "gemma-scope-20.safetensors").write_bytes(row_set_format.to_bytes(features))
    small = {20: 0.01 * read[20]}  # within the largest dose
    low_rank = RowSet(kind="low_rank", read=small, write=small)
    (folder / "loreft-truthful.safetensors").write_bytes(row_set_format.to_bytes(low_rank))


@pytest.fixture(scope="module")
def served(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that the pages assume, with everything armed that they use."""
    command = steer_engine_serve(
        "smollm2-135m", "--steering-vectors", str(vectors), "--steering-capture", "all", *ARMED
    )
    server = Server(command, tmp_path_factory.mktemp("server") / "server.log", env={ADMIN_KEYS_ENV: ADMIN})
    yield server
    server.kill()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Page -> the folder where its blocks run."""
    return {page: tmp_path_factory.mktemp("page") for page in {block.page for block in BLOCKS}}


@pytest.fixture
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """That of the block's page, with what a clone of the repository has, and vectors/cheerful.safetensors."""
    block: Block = request.node.callspec.params["block"]
    made = folders[block.page]
    if not (made / ".venv").exists():
        (made / ".venv").symlink_to(sys.prefix)
        (made / ".curlrc").write_text("fail\nshow-error\n")
        shutil.copytree(ROOT / "examples", made / "examples")
        if block is not QUICK_START:
            shutil.copytree(request.getfixturevalue("vectors"), made / "vectors")
    return made


def environment(folder: Path, url: str = "") -> dict[str, str]:
    """That of a user who has activated .venv and set the URL and the admin key of a server."""
    kept = {name: value for name, value in os.environ.items() if name not in API_KEY_ENVS}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CURL_HOME": str(folder),
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        URL_ENV: url,
        ADMIN_KEY_ENV: ADMIN,
    }


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def run(block: Block, folder: Path, address: str, *, serve_flags: str = "") -> str:
    """Run a block with its hidden lines, and return what it prints. Its server is at `address`."""
    text = f"{block.before}\n{block.text}".replace(ADDRESS, address)
    if serve_flags:
        assert text.count("steer-engine serve smollm2-135m") == 1
        text = text.replace("steer-engine serve smollm2-135m", f"steer-engine serve smollm2-135m {serve_flags}")
    shell = ["bash", "-eo", "pipefail", "-c"]
    done = subprocess.run(
        [*(shell if block.language == "sh" else [sys.executable, "-P", "-c"]), text],
        cwd=folder, env=environment(folder, f"http://{address}"), capture_output=True, text=True, timeout=BLOCK_SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{block.id} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done.stdout


def needs_server(block: Block) -> bool:
    text = f"{block.before}\n{block.text}"
    called = [words[0] for words in commands(text, "steer-engine") if words] if block.language == "sh" else []
    return not REMOTE.isdisjoint(called) or ADDRESS in text


@pytest.mark.parametrize("block", [QUICK_START], ids=[QUICK_START.id])
def test_the_quick_start_pasted_whole(block: Block, folder: Path) -> None:
    port = free_port()
    answers = run(block, folder, f"localhost:{port}", serve_flags=f"--port {port}").splitlines()[-3:]
    assert len(set(answers)) == 3
    for answer in answers:
        words = answer.lower().split()
        assert len(words) > 10
        assert len(set(words)) >= 0.6 * len(words)
    assert (folder / "server.log").stat().st_size > 0


@pytest.mark.parametrize("block", [block for block in BLOCKS if block is not QUICK_START], ids=lambda block: block.id)
def test_block_runs(block: Block, folder: Path, request: pytest.FixtureRequest) -> None:
    address = ADDRESS
    if needs_server(block):
        server: Server = request.getfixturevalue("served")
        address = server.url.removeprefix("http://")
    run(block, folder, address)


@pytest.mark.parametrize("block", [block for block in all_blocks() if request_in(block)], ids=lambda block: block.id)
def test_request_is_accepted(block: Block, served: Server) -> None:
    body = json.loads(block.text)
    if "model" in body:
        answer = served.post("/v1/chat/completions" if "messages" in body else "/v1/completions", body)
    else:
        answer = served.post("/v1/steering/validate", request_in(block))
    assert answer.status_code == 200, answer.text
