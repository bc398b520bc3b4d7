"""`steer-engine vectors report`, `import` and `show` on files."""

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
    with pytest.raises(VectorFileError, match="same stem"):
        run("report", tmp_path / "a.safetensors", tmp_path / "a.gguf", "--out", tmp_path / "r.html")
    with pytest.raises(VectorFileError, match=r"must end in \.html"):
        run("report", tmp_path / "a.safetensors", "--out", tmp_path / "r.pdf")


def test_import_converts_and_replaces_with_force_only(vector: ControlVector, tmp_path: Path) -> None:
    save(vector, tmp_path / "theirs.gguf")
    arguments = ["import", tmp_path / "theirs.gguf", "--kind", "gguf", "--out", tmp_path / "ours.safetensors"]
    assert vector.digest in run(*arguments, "--model", "example/model").replace("\n", "")
    assert load(tmp_path / "ours.safetensors") == vector
    assert load(tmp_path / "ours.safetensors").metadata.model == "example/model"
    with pytest.raises(VectorFileError, match="the file exists"):
        run(*arguments)
    run(*arguments, "--force")
    with pytest.raises(VectorFileError, match="must end in"):
        run("import", tmp_path / "theirs.gguf", "--kind", "gguf", "--out", tmp_path / "ours.pt")


def test_show_of_a_folder_prints_whole_digests_to_a_pipe(vector: ControlVector, tmp_path: Path) -> None:
    save(vector.with_metadata(model="m" * 200), tmp_path / "calm.safetensors")
    (row,) = [line for line in run("show", tmp_path).splitlines() if "calm" in line]
    assert vector.digest in row
    (tmp_path / "broken.gguf").write_bytes(b"no")
    with pytest.raises(VectorFileError, match=r"Not usable: broken\.gguf"):
        run("show", tmp_path)
