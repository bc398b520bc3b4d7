"""Help of every command, and mistakes of a start: answered at once, in a line that says what to do, without vLLM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import typer

from steer_engine.cli.main import app
from steer_engine.vectors import ControlVector, save

REPORT = """
import resource, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["steer-engine", *sys.argv[1:]]
from steer_engine.cli.main import main
try:
    main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = [name for name in ("vllm", "torch", "transformers", "ray") if name in sys.modules]
    print("REPORT", round(used.ru_utime + used.ru_stime, 2), *heavy, file=sys.stderr)
"""


class Done:
    """A command that has run: its status, its output, and what it cost and imported."""

    def __init__(self, *arguments: str, missing: tuple[str, ...] = (), **env: str) -> None:
        code = REPORT.replace("{missing!r}", repr(missing))
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"} | env,
        )  # fmt: skip
        self.status, self.out = done.returncode, done.stdout
        self.error, _, report = done.stderr.partition("REPORT")
        seconds, *self.heavy = report.split()
        self.cpu_seconds = float(seconds)

    def assert_mistake(self, *words: str, seconds: float = 3.0) -> None:
        assert self.status == 1, (self.out, self.error)
        assert self.error.startswith("error: ")
        assert self.error.count("\n") <= 2
        assert "Traceback" not in self.error
        for word in words:
            assert word in self.error
        assert self.heavy == []
        assert self.cpu_seconds < seconds


def commands(group: click.Command, *names: str) -> Iterator[tuple[str, ...]]:
    yield names
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


ALL = list(commands(typer.main.get_command(app)))


def test_the_walk_sees_subcommands() -> None:
    assert {("serve",), ("condition", "fit"), ("vectors", "show"), ("models", "list")} <= set(ALL)


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_help_takes_less_than_a_second_and_imports_no_engine(names: tuple[str, ...]) -> None:
    done = Done(*names, "--help")
    assert done.status == 0, done.error
    assert "usage" in done.out.lower()
    assert done.heavy == []
    assert done.cpu_seconds < 1


def test_help_of_serve_shows_our_flags_first_and_how_to_see_those_of_vllm() -> None:
    for flag in ("-h", "--help"):
        text = Done("serve", "smollm2-135m", flag).out
        assert text.index("--steering-vectors") < text.index("--steering-strict") < text.index("--port")
        assert "steer-engine serve --help=all" in text
        assert max(map(len, text.splitlines())) <= 120


def test_commands_are_in_groups() -> None:
    text = Done("--help").out
    for group in ("Serve", "Derive vectors", "Measure effects", "Vectors, presets and models"):
        assert f"{group} ─" in text


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags in (("--port", port), (f"--port={port}",)):
            Done("serve", "smollm2-135m", "--host", "127.0.0.1", *flags).assert_mistake(f"Port {port}", "--port ")
    Done("serve", "smollm2-135m", "--port", "70000").assert_mistake("70000", "65535")


@pytest.mark.parametrize("name", ["smollm-135m", "smollm2", "SmolLM2-135M"])
def test_an_unknown_model_name_suggests_a_packaged_one(name: str) -> None:
    Done("serve", name).assert_mistake(f"'{name}'", "smollm2-135m", "OWNER/NAME")


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    Done("serve", "./nowhere").assert_mistake("There is no folder ./nowhere")
    Done("serve", "org/nothing").assert_mistake("'org/nothing'", "HF_HUB_OFFLINE", "smollm2-135m")
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    Done("serve", "org/nothing", **away).assert_mistake("http://127.0.0.1:9 is unreachable")


def hub_cache(home: Path, name: str, num_blocks: int) -> None:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    config = {"num_hidden_layers": num_blocks}
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))


def test_a_block_that_the_model_does_not_have(tmp_path: Path) -> None:
    hub_cache(tmp_path, "org/small", 12)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 12}}))
    for model in ("org/small", str(tmp_path)):
        done = Done("serve", model, "--steering-blocks", "8-12", HF_HOME=str(tmp_path))
        done.assert_mistake("block 12", "12 blocks, 0-11")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            flags = ("--host", "127.0.0.1", "--port", str(taken.getsockname()[1]), "--steering-blocks", "8-11")
            Done("serve", model, *flags, HF_HOME=str(tmp_path)).assert_mistake("Port ")
    Done("serve", "smollm2-135m", "--steering-blocks", "9-3").assert_mistake("--steering-blocks", "9-3")


def test_a_missing_folder_of_vectors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        folder = str(tmp_path / name)
        Done("serve", "smollm2-135m", "--steering-vectors", folder).assert_mistake(folder, "is not a folder")
        Done("serve", "smollm2-135m", STEER_ENGINE_VECTORS=folder).assert_mistake(folder, "is not a folder")


def test_a_missing_extra() -> None:
    Done("serve", "smollm2-135m", missing=("vllm", "huggingface_hub", "httpx")).assert_mistake(
        "vLLM is missing: pip install 'steer-engine[cpu]'", "'steer-engine[cuda]'"
    )


def test_a_misspelt_flag_of_ours_is_named() -> None:
    Done("serve", "smollm2-135m", "--steering-vector", "x").assert_mistake("--steering-vector", "--steering-vectors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("not json", ":1: not JSON"),
        ('{"positive": "a"}', ":1: the key 'negative' is missing"),
        ("", "the file is empty"),
    ],
)
def test_a_fault_of_a_pairs_file_is_found_before_an_engine_starts(
    tmp_path: Path, content: str | None, words: str
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    if content is not None:
        pairs.write_text(content)
    for command in ("derive", "dump"):
        done = Done(command, "smollm2-135m", "--pairs", str(pairs), "--out", str(tmp_path / "out.safetensors"))
        done.assert_mistake(str(pairs), words)


def test_faults_of_prompts_and_tasks_are_found_before_an_engine_starts(tmp_path: Path) -> None:
    vector = str(tmp_path / "v.safetensors")
    save(ControlVector(directions={3: np.ones(576, dtype=np.float32)}), Path(vector))
    texts, nowhere = tmp_path / "texts.txt", str(tmp_path / "nowhere.jsonl")
    texts.write_text("".join(f"prompt {number}\n" for number in range(12)))
    fit = ("condition", "fit", vector, "--model", "smollm2-135m")
    Done(*fit, "--positive", nowhere, "--negative", str(texts)).assert_mistake(nowhere)
    Done(*fit, "--positive", str(texts), "--negative", nowhere).assert_mistake(nowhere)
    task = ("--task", nowhere, "--out", str(tmp_path / "out"))
    Done("eval", "smollm2-135m", "--vector", vector, *task).assert_mistake(nowhere)
    Done("calibrate", "smollm2-135m", vector, *task).assert_mistake(nowhere)
