"""What `steer-engine serve` prints: few lines and one block when it starts, and the reason when it does not."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from helpers.server_process import START_SECONDS, Server, free_port, steer_engine_serve

from steer_engine.vectors import ControlVector, save
from steer_engine.vllm import launch, start_log

MAX_LINES = 25

LOG_ONE_LINE_EACH = """
import json, logging, logging.config, sys
logging.config.dictConfig(json.load(open(sys.argv[1])))
logging.getLogger("steer_engine").parent = logging.getLogger("vllm")
for name, level, text in json.loads(sys.argv[2]):
    logging.getLogger(name).log(level, text)
"""
RECORDS: list[tuple[str, int, str, bool]] = [
    ("vllm.v1.engine.core", logging.INFO, "Initializing a V1 LLM engine", False),
    ("vllm.config.vllm", logging.WARNING, "Enforce eager set, disabling torch.compile", False),
    ("vllm.config.vllm", logging.WARNING, "Something that nobody knew before", True),
    ("vllm.config.vllm", logging.ERROR, "Enforce eager set, and this is an error", True),
    ("vllm.v1.metrics.loggers", logging.INFO, "Engine 000: Avg prompt throughput", True),
    ("steer_engine.requests", logging.INFO, "steered {}", True),
    ("steer_engine.vectors.folder", logging.INFO, "Control vector v1", False),
    ("steer_engine.vectors.folder", logging.ERROR, "broken.safetensors is left out", True),
    ("steer_engine.ready", logging.INFO, "the block", True),
    ("uvicorn.error", logging.INFO, "Waiting for application startup.", False),
    ("uvicorn.error", logging.ERROR, "Exception in ASGI application", True),
]
"""Logger, level and text of a record, and whether it is shown."""


def parsed(*argv: str) -> Namespace:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    return launch._parse(ServeSubcommand(), ["org/model", *argv])


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*start_log.USERS_OWN, "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


def test_the_configuration_hides_routine_lines_and_nothing_else() -> None:
    args = parsed()
    start_log.hide_routine(args)
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == args.log_config_file
    command = [sys.executable, "-P", "-c", LOG_ONE_LINE_EACH, args.log_config_file]
    given = json.dumps([record[:3] for record in RECORDS])
    done = subprocess.run([*command, given], capture_output=True, text=True, timeout=120, check=True)
    printed = done.stdout + done.stderr
    for name, _, text, is_shown in RECORDS:
        assert (text in printed) == is_shown, (name, text, printed)
    assert "the block\n" in printed.splitlines(keepends=True), "the block has no prefix"


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        (["--verbose"], {}),
        (["--logging-config.formatter", "json"], {}),
        (["--logging-config.pylogging_config_file", "mine.json"], {}),
        ([], {"VLLM_LOGGING_CONFIG_PATH": "mine.json"}),
        ([], {"VLLM_LOGGING_LEVEL": "DEBUG"}),
        ([], {"VLLM_CONFIGURE_LOGGING": "0"}),
    ],
)
def test_settings_of_the_users_own_are_left_alone(
    flags: list[str], env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    args = parsed(*flags)
    before = dict(vars(args))
    start_log.hide_routine(args)
    assert vars(args) == before
    assert "PYTHONWARNINGS" not in os.environ


def test_access_lines_that_the_user_hides_stay_hidden() -> None:
    made = start_log._configuration(parsed("--disable-access-log-for-endpoints", "/health, /metrics"))
    assert made["filters"]["paths"]["excluded_paths"] == ["/health", "/metrics"]


@pytest.fixture(scope="module")
def started(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines of a server from its start until it answers; it then stops."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "vectors").mkdir()
    for number in range(40):
        vector = ControlVector(directions={1: [1.0, float(number)] * 32})  # type: ignore[dict-item]
        save(vector, folder / "vectors" / f"v{number}.safetensors")
    flags = ["--steering-blocks", "1-2", "--steering-monitor", "low=v1:1:cosine", "--steering-monitor=high=v2:1:dot"]
    command = steer_engine_serve(tiny_llama, "--steering-vectors", str(folder / "vectors"), *flags)
    server = Server(command, folder / "server.log")
    try:
        lines = server.log.splitlines()
        assert server.get("/health").status_code == 200
        assert '"GET /health HTTP/1.1" 200' in server.log, "lines about requests stay"
        assert server.stop() == 0
    finally:
        server.kill()
    return [line for line in lines if "/readyz" not in line]


def test_a_start_prints_few_lines(started: list[str]) -> None:
    assert len(started) <= MAX_LINES, "\n".join(started)
    for word in ("ERROR", "Traceback", "duplicate"):
        assert not any(word in line for line in started), "\n".join(started)


def test_a_start_ends_with_one_block(started: list[str], tiny_llama: str) -> None:
    first = next(index for index, line in enumerate(started) if line.startswith("Steer Engine"))
    block = dict(line.split(maxsplit=1) for line in started[first + 1 :])
    assert list(block) == ["URL", "playground", "model", "armed", "vectors", "keys"]
    assert block["URL"].startswith("http://127.0.0.1:")
    assert block["URL"].endswith("/v1")
    assert block["playground"].endswith("/playground")
    assert block["model"] == tiny_llama
    assert block["armed"].startswith("blocks 1-2 of 3; add, ")
    assert block["vectors"].startswith("40 in ")
    assert block["vectors"].endswith(": v0, v1, v10, v11, v12, v13, ...")
    assert "clients off" in block["keys"]
    assert "STEER_ENGINE_ADMIN_KEYS" in block["keys"]


def test_a_start_that_fails_shows_its_reason(tiny_llama: str, tmp_path: Path) -> None:
    """The engine core finds that the cache has no room: two processes away from the terminal."""
    flags = ("--kv-cache-memory-bytes", "1000", "--host", "127.0.0.1", "--port", str(free_port()))
    done = subprocess.run(
        steer_engine_serve(tiny_llama, "--steering-vectors", str(tmp_path), *flags),
        capture_output=True, text=True, timeout=START_SECONDS, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "No available memory for the cache blocks" in printed, printed
    assert "ERROR" in printed
    assert "is ready" not in printed
