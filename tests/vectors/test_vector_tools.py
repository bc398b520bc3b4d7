"""`steer-engine vectors report`, `import`, `convert` and `show` on files."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.gguf_files import write_gguf
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


def test_import_says_how_a_projection_is_used(tmp_path: Path) -> None:
    write_gguf(tmp_path / "glp.gguf", {"glp.mode": "project", "glp.alpha_default": 4.0})
    arguments = ["import", tmp_path / "glp.gguf", "--kind", "gguf", "--out", tmp_path / "glp.safetensors"]
    assert "Made for op 'ablate' with scale 4." in run(*arguments)
    write_gguf(tmp_path / "glp.gguf", {"glp.mode": "rotate"})
    arguments[-1] = tmp_path / "other.safetensors"
    with pytest.raises(VectorFileError, match="glp.mode = 'rotate' is not supported.*--force"):
        run(*arguments)
    assert "Ignored in the file: glp.mode = 'rotate'" in run(*arguments, "--force")


def test_convert_to_gguf_and_back(vector: ControlVector, tmp_path: Path) -> None:
    save(vector, tmp_path / "a.safetensors")
    assert vector.digest in run("convert", tmp_path / "a.safetensors", tmp_path / "b.gguf")
    assert load(tmp_path / "b.gguf") == vector
    run("convert", tmp_path / "b.gguf", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(VectorFileError, match="the file exists"):
        run("convert", tmp_path / "b.gguf", tmp_path / "c.safetensors")
    run("convert", tmp_path / "b.gguf", tmp_path / "c.safetensors", "--force")
    with pytest.raises(VectorFileError, match="must end in"):
        run("convert", tmp_path / "b.gguf", tmp_path / "c.pt")
    with pytest.raises(VectorFileError, match="must end in"):
        run("convert", tmp_path / "b.pt", tmp_path / "d.gguf")


def test_convert_keeps_the_operation_of_a_projection(tmp_path: Path) -> None:
    write_gguf(tmp_path / "glp.gguf", {"glp.mode": "project", "glp.alpha_default": 4.0})
    run("convert", tmp_path / "glp.gguf", tmp_path / "a.safetensors")
    run("convert", tmp_path / "a.safetensors", tmp_path / "b.gguf")
    with pytest.raises(VectorFileError, match="made for op 'ablate' with scale 4"):
        load(tmp_path / "b.gguf")


def test_show_of_a_folder_prints_whole_digests_to_a_pipe(vector: ControlVector, tmp_path: Path) -> None:
    save(vector.with_metadata(model="m" * 200), tmp_path / "calm.safetensors")
    (row,) = [line for line in run("show", tmp_path).splitlines() if "calm" in line]
    assert vector.digest in row
    (tmp_path / "broken.gguf").write_bytes(b"no")
    with pytest.raises(VectorFileError, match=r"Not usable: broken\.gguf"):
        run("show", tmp_path)
