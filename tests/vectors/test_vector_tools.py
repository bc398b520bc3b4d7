from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, load, save


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["vectors", *(str(argument) for argument in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_report_writes_a_page_and_suggests(vector: ControlVector, tmp_path: Path) -> None:
    save(vector, tmp_path / "a.safetensors")
    save(vector, tmp_path / "b.gguf")
    output = run("report", tmp_path / "a.safetensors", tmp_path / "b.gguf", "--out", tmp_path / "r.html")
    assert "a: start with blocks 3-3, scale " in output
    assert "Cosine between vectors" in (tmp_path / "r.html").read_text()
    save(vector, tmp_path / "a.gguf")
    with pytest.raises(VectorFileError, match="same name"):
        run("report", tmp_path / "a.safetensors", tmp_path / "a.gguf", "--out", tmp_path / "r.html")
    with pytest.raises(VectorFileError, match=r"ends in \.html or \.png"):
        run("report", tmp_path / "a.safetensors", "--out", tmp_path / "r.pdf")


def test_import_converts_and_does_not_replace_unasked(vector: ControlVector, tmp_path: Path) -> None:
    save(vector, tmp_path / "theirs.gguf")
    arguments = ["import", tmp_path / "theirs.gguf", "--kind", "gguf", "--out", tmp_path / "ours.safetensors"]
    assert vector.digest in run(*arguments, "--model", "example/model").replace("\n", "")
    assert load(tmp_path / "ours.safetensors") == vector
    assert load(tmp_path / "ours.safetensors").metadata.model == "example/model"
    with pytest.raises(VectorFileError, match="there is such a file already"):
        run(*arguments)
    run(*arguments, "--force")
    with pytest.raises(VectorFileError, match="must end in"):
        run("import", tmp_path / "theirs.gguf", "--kind", "gguf", "--out", tmp_path / "ours.pt")
