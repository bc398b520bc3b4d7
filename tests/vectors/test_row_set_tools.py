"""The commands on features and low-rank edits: import, show, report, convert, export, and the catalogue of features."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata
from steer_engine.vectors.files import load_any, save
from steer_engine.vectors.report import html_report
from steer_engine.vectors.sae_formats import load_saelens


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    """A SAELens autoencoder with 9 features of block 3, and Neuronpedia's explanations of three beside it."""
    folder = tmp_path / "sae"
    folder.mkdir()
    rng = np.random.default_rng(1)
    shapes = {"W_enc": (4, 9), "W_dec": (9, 4), "b_enc": (9,), "b_dec": (4,)}
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2"}))
    labels = {5: "words of [bold]Praise[/bold]", 2: "blame, and praise of cats", 7: "cats"}
    lines = "\n".join(json.dumps({"index": str(number), "description": text}) for number, text in labels.items())
    (folder / "explanations.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def test_from_a_word_to_a_file_with_labels(sae: Path, tmp_path: Path) -> None:
    listed = run("features", "list", sae, "--search", "PRAISE")
    assert "words of [bold]Praise[/bold]" in listed
    assert "blame, and praise of cats" in listed
    assert " 7 " not in listed
    assert " 2 " in run("features", "list", sae / "sae_weights.safetensors", "--search", "cats praise")
    with pytest.raises(VectorFileError, match="no label contains 'dogs'"):
        run("features", "list", sae, "--search", "dogs")

    out = tmp_path / "praise.safetensors"
    labels = sae / "explanations.jsonl.gz"
    output = run("vectors", "import", sae, "--features", "5, 0", "--labels", labels, "--out", out)
    rows = load_any(out)
    assert isinstance(rows, RowSet)
    assert rows.digest in output
    assert rows.labels == {3: {5: "words of [bold]Praise[/bold]"}}
    np.testing.assert_array_equal(rows.write[3], load_file(sae / "sae_weights.safetensors")["W_dec"][[0, 5]])

    shown = run("vectors", "show", out)
    assert "words of [bold]Praise[/bold]" in shown
    assert rows.digest in shown
    assert "2 rows, features" in run("vectors", "show", tmp_path)
    catalogue = run("features", "list", out)
    assert " 0 " in catalogue
    assert "words of" in catalogue


def test_the_list_is_cut_where_it_says(sae: Path) -> None:
    assert "More than 1 features match" in run("features", "list", sae, "--limit", "1")


def test_what_has_no_labels(sae: Path, tmp_path: Path) -> None:
    (sae / "explanations.jsonl.gz").unlink()
    with pytest.raises(VectorFileError, match=r"put Neuronpedia's explanations beside it as explanations\.jsonl"):
        run("features", "list", sae)
    save(ControlVector(directions={1: np.ones(3, np.float32)}), tmp_path / "v.safetensors")
    with pytest.raises(VectorFileError, match="the file has no features; .* describes it"):
        run("features", "list", tmp_path / "v.safetensors")


@pytest.mark.parametrize("features", ["x", "1,,2", "1;2", "-1", "1.5", "٣", "1" * 11])
def test_numbers_that_are_none(sae: Path, tmp_path: Path, features: str) -> None:
    with pytest.raises(VectorFileError, match="are not numbers with commas between them, such as 12,345"):
        run("vectors", "import", sae, "--features", features, "--out", tmp_path / "o.safetensors")


def low_rank() -> RowSet:
    rows = {block: np.eye(4, dtype=np.float32)[:2] for block in (1, 2)}
    return RowSet(kind="low_rank", read=rows, write=rows, metadata=VectorMetadata(method="LoReFT"))


def test_convert_and_export(sae: Path, tmp_path: Path) -> None:
    rows = load_saelens(sae, [5, 0])
    save(rows, tmp_path / "f.safetensors")
    run("vectors", "convert", tmp_path / "f.safetensors", tmp_path / "g.safetensors")
    assert load_any(tmp_path / "g.safetensors") == rows
    with pytest.raises(VectorFileError, match="GGUF has no place for a set of features"):
        run("vectors", "convert", tmp_path / "f.safetensors", tmp_path / "g.gguf")
    run("vectors", "export", tmp_path / "f.safetensors", tmp_path / "out", "--kind", "saelens")
    np.testing.assert_array_equal(load_saelens(tmp_path / "out", [1]).read[3], rows.read[3][1:])
    with pytest.raises(VectorFileError, match="it exists; choose another name"):
        run("vectors", "export", tmp_path / "f.safetensors", tmp_path / "out", "--kind", "saelens")

    save(low_rank(), tmp_path / "r.safetensors")
    run("vectors", "export", tmp_path / "r.safetensors", tmp_path / "reft", "--kind", "reft")
    run("vectors", "import", tmp_path / "reft", "--out", tmp_path / "back.safetensors")
    assert load_any(tmp_path / "back.safetensors") == low_rank()

    save(ControlVector(directions={1: np.ones(3, np.float32)}), tmp_path / "v.safetensors")
    run("vectors", "export", tmp_path / "v.safetensors", tmp_path / "v.json", "--kind", "neuronpedia")
    run("vectors", "import", tmp_path / "v.json", "--out", tmp_path / "w.safetensors")
    assert load_any(tmp_path / "w.safetensors") == load_any(tmp_path / "v.safetensors")
    for kind, message in (("saelens", "it is a control vector, which saelens"), ("pt", "no kind 'pt' to export to")):
        with pytest.raises(VectorFileError, match=message):
            run("vectors", "export", tmp_path / "v.safetensors", tmp_path / "x", "--kind", kind)


def test_show_and_report_of_a_low_rank_edit(tmp_path: Path) -> None:
    save(low_rank(), tmp_path / "r.safetensors")
    shown = run("vectors", "show", tmp_path / "r.safetensors")
    assert "off from orthonormal R" in shown
    assert low_rank().digest in shown
    output = run("vectors", "report", tmp_path / "r.safetensors", "--out", tmp_path / "r.html")
    assert "written" in output
    assert "deviation of R from orthonormal" in (tmp_path / "r.html").read_text()


def test_a_report_of_features_beside_a_vector_escapes_labels(sae: Path) -> None:
    rows = load_saelens(sae, [5]).with_labels({3: {5: "<script>"}})
    page = html_report({"f": rows, "v": ControlVector(directions={1: np.ones(4, np.float32)})})
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert page.index("<h2>v</h2>") < page.index("<h2>f</h2>")
