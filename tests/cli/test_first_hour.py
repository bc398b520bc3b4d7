"""Help of every command, and mistakes of a start: answered at once, in a line that says what to do, without vLLM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

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
    heavy = sorted({"vllm", "torch", "transformers", "ray", "gguf", "pandas", "sklearn"} & sys.modules.keys())
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
        headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert headings == [
            "Vectors:",
            "What is armed:",
            "Requests:",
            "Output:",
            "Often used, of vLLM's flags:",
            "Example:",
        ]
        place = {words: text.index(words) for words in (*headings, "--steering-mirror", "--steering-rows", "--verbose")}
        assert place["Vectors:"] < place["--steering-mirror"] < place["What is armed:"] < place["--steering-rows"]
        assert place["Output:"] < place["--verbose"] < place["Often used, of vLLM's flags:"]


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


@pytest.fixture
def commands_with(tmp_path: Path) -> Callable[..., list[tuple[str, ...]]]:
    """Every command that starts an engine, valid but for what is given: a model, and its blocks."""
    (tmp_path / "pairs.jsonl").write_text('{"positive": "a b", "negative": "c d"}\n' * 3)
    (tmp_path / "in.jsonl").write_text('{"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "a"}}')
    vector, prompts, pairs = str(tmp_path / "v.safetensors"), str(tmp_path / "p.txt"), str(tmp_path / "pairs.jsonl")
    save(ControlVector(directions={3: np.ones(576, dtype=np.float32)}), Path(vector))
    Path(prompts).write_text("".join(f"prompt {number}\n" for number in range(12)))
    out = ("--out", str(tmp_path / "out.safetensors"))
    both = ("--positive", prompts, "--negative", prompts)
    results = ("--task", "ioi", "--out", str(tmp_path / "results"))

    def commands_of(model: str, blocks: str = "") -> list[tuple[str, ...]]:
        some = ("--blocks", blocks) if blocks else ()
        steered = ("--steering-blocks", blocks) if blocks else ()
        return [
            ("serve", model, *steered),
            ("doctor", model, *steered),
            ("batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", model, *steered),
            ("derive", model, "--pairs", pairs, *out, *some),
            ("dump", model, "--pairs", pairs, "--out", str(tmp_path / "dump"), *some),
            ("eval", model, *results, *some),
            ("calibrate", model, vector, *results, *some),
            ("probe", "fit", "--model", model, *both, *out, *some),
        ]

    return commands_of


def run_all(commands: list[tuple[str, ...]], *words: str, env: dict[str, str], missing: tuple[str, ...] = ()) -> None:
    """All commands fail at once with these words. `doctor` prints its verdict on standard output."""
    for command in commands:
        done = Done(*command, missing=missing, **env)
        if command[0] == "doctor" and not missing:
            assert done.out.startswith("no: ")
            done.error, done.out = f"error: {done.out}", ""
        done.assert_mistake(*words)


CommandsWith = Callable[..., list[tuple[str, ...]]]


def test_every_command_names_an_unknown_model_at_once(commands_with: CommandsWith, tmp_path: Path) -> None:
    run_all(commands_with("smollm-135m"), "'smollm-135m'", "smollm2-135m", env={})
    run_all(commands_with(str(tmp_path)), str(tmp_path), "no config.json", env={})


def test_every_command_names_a_block_that_the_model_lacks(commands_with: CommandsWith, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    run_all(commands_with(str(model), "8-14"), "block 12-14", "12 blocks, 0-11", env={})


def test_every_command_names_a_missing_extra(commands_with: CommandsWith) -> None:
    run_all(
        commands_with("smollm2-135m"), "vLLM is missing: pip install 'steer-engine[cpu]'", env={}, missing=("vllm",)
    )
    derive = [command for command in commands_with("smollm2-135m") if command[0] == "derive"]
    run_all(derive, "ray is missing: pip install 'steer-engine[derive]'", env={}, missing=("ray",))
    measure = [command for command in commands_with("smollm2-135m") if command[0] == "eval"]
    run_all(measure, "scipy is missing", env={}, missing=("scipy",))


def test_on_a_cluster_only_the_nodes_need_the_model(commands_with: CommandsWith) -> None:
    (derive,) = (command for command in commands_with("/models/of/the/nodes", "0-99") if command[0] == "derive")
    done = Done(*derive, "--ray-address", "127.0.0.1:1", missing=("vllm",))
    assert done.status == 1
    assert done.error.startswith("error: There is no Ray cluster at '127.0.0.1:1'")


class Hub(BaseHTTPRequestHandler):
    """A hub that has one model, hides another, and fails for a third."""

    def do_HEAD(self) -> None:
        statuses = {"/api/models/org/there": 200, "/api/models/org/hidden": 401, "/api/models/org/broken": 500}
        self.send_response(statuses.get(self.path, 404))
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        del format, arguments


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a command whose hub is `Hub`, and whose cache is empty."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
        }
        server.shutdown()


def test_a_mistyped_model_of_the_hub_is_named_at_once(hub: dict[str, str], commands_with: CommandsWith) -> None:
    few = [command for command in commands_with("org/ther") if command[0] in ("serve", "derive", "eval")]
    run_all(few, hub["HF_ENDPOINT"], "no model 'org/ther'", "Check the spelling", env=hub)
    Done("serve", "org/hidden", **hub).assert_mistake("'org/hidden'", "HF_TOKEN")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ("--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
        for model in ("org/there", "org/broken"):  # only the hub's own client can tell more
            Done("serve", model, *flags, **hub).assert_mistake("Port ")


def test_a_folder_or_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    Done("serve", str(tmp_path)).assert_mistake(f"The folder {tmp_path} has no config.json")
    Done("serve", str(tmp_path / "weights.bin")).assert_mistake("weights.bin is a file")
    elsewhere = ("--hf-config-path", "org/config", "--port", "70000")
    Done("serve", str(tmp_path), *elsewhere).assert_mistake("70000")


def test_results_that_cannot_be_written_are_refused_before_an_engine_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "results")
    Done("eval", "smollm2-135m", "--task", "ioi", "--out", out).assert_mistake(out, "not a folder")


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    Done("serve", "./nowhere").assert_mistake("There is no folder ./nowhere")
    Done("serve", "org/nothing").assert_mistake("'org/nothing'", "HF_HUB_OFFLINE", "smollm2-135m")
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    Done("serve", "org/nothing", **away).assert_mistake("http://127.0.0.1:9 is unreachable")
    with_password = away | {"HF_ENDPOINT": "http://me:secret@127.0.0.1:9"}
    Done("serve", "org/nothing", **with_password).assert_mistake(" http://127.0.0.1:9 is unreachable")


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
