"""The commands `eval`, `paper` and `calibrate`: errors before an engine starts, and one run as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from steer_engine.cli.evaluate import calibrate_command, eval_command, paper_command, search_command
from steer_engine.errors import EvaluationError, SteerError
from steer_engine.vectors import ControlVector, VectorMetadata, load, save

COMMANDS = {
    "eval": eval_command, "paper": paper_command, "calibrate": calibrate_command, "search": search_command
}  # fmt: skip
SCRIPT = Path(sys.executable).with_name("steer-engine")


def invoke(command: str, *arguments: str) -> Result:
    """Run a command in this process, with arguments as the command line passes them."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(COMMANDS[command])
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    tasks = "key-value compare " if command == "search" else ""
    assert f"steer-engine {command} {tasks}smollm2-135m" in invoke(command, "--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("categories", "no-such-model"), "There is no task or file 'categories'"),
        (("category", "no-such-model", "--recipe", "magic"), "--recipe 'magic' is none of shots, labels, format"),
        (("category", "no-such-model", "--score", "margin"), "--score 'margin' is none of accuracy, balanced, auroc"),
        (("category", "no-such-model", "--alphas", "0"), "All strengths are 0"),
        (("category", "no-such-model", "--recipe", "shots", "--recipe", "shots"), "Give each recipe once"),
    ],
)
def test_an_invalid_search_needs_no_engine(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoke("search", *arguments, "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, SteerError)
    assert message in done.exception.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "ioj"), "There is no task or file 'ioj'"),
        (("--task", "ioi", "--alphas", "1:2"), "Strengths '1:2' are not valid"),
        (("--task", "ioi", "--unit", "norms"), "--unit 'norms' is none of vector, residual"),
        (("--task", "ioi", "--method", "magic"), "There is no method 'magic'"),
        (("--task", "ioi", "--against", "right"), "--against 'right' is none of wrong, random"),
        (("--task", "ioi", "--blocks", "x"), "--blocks: 'x' is not valid"),
        (("--task", "ioi", "--vector", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_invalid_options_need_no_engine(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoke("eval", "no-such-model", "--out", str(tmp_path / "out"), *arguments)
    assert isinstance(done.exception, SteerError)  # which `steer-engine` prints as one line
    assert message in done.exception.message
    assert not (tmp_path / "out").exists()


def test_a_report_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for command, *rest in (("eval", "--task", "ioi"), ("paper",), ("calibrate", "v.safetensors", "--task", "ioi")):
        done = invoke(command, "no-such-model", *rest, "--out", str(tmp_path))
        assert isinstance(done.exception, EvaluationError)
        assert "steer-engine[report]" in done.exception.message


@pytest.mark.slow
def test_calibrate_writes_a_suggested_strength(tiny_llama: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    vector = ControlVector(directions={1: row}, metadata=VectorMetadata(notes="mine"))
    source, out = tmp_path / "v.safetensors", tmp_path / "out"
    save(vector, source)
    sizes = ("--derive-items", "8", "--validation-items", "8", "--test-items", "8")
    environment = os.environ | {"NO_COLOR": "1", "OMP_WAIT_POLICY": "passive"}
    command = [
        SCRIPT, "calibrate", tiny_llama, str(source), "--task", "ioi", "--out", str(out),
        "--blocks", "1", "--alphas=-0.1,0.1", "--dtype", "float32", "--max-kl", "1", *sizes,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = load(out / "v.safetensors")
    assert written.digest == vector.digest
    assert written.metadata.notes == "mine"
    assert abs(float(written.metadata.extra["suggested_scale"])) == 0.1
    assert "test items" in written.metadata.extra["suggested_because"]
    assert (out / "report.html").is_file()
