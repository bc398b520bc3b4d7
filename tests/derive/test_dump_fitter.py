"""Fits and projections of dumps: equal to rows in memory, however the shards were cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.derivation import REFERENCES, cosine
from helpers.dumping import BLOCKS, contrast, texts_of, write
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.actors import ray_session
from steer_engine.derive.dump_fitter import DumpFitter, fit_dump, project
from steer_engine.derive.methods import FROM_ROWS, METHODS, PAIRED
from steer_engine.errors import DerivationError
from steer_engine.vectors import ControlVector, VectorMetadata, load, save


def direction(path: Path, method: str, block: int = 9) -> np.ndarray:
    return DumpFitter(str(path)).fit(block, method).direction_D


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 8), (70, 100)], ids=["tall", "wide"])
def test_every_method_from_shards_is_what_it_is_from_rows_in_memory(
    method: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    rows = contrast(*shape)
    write(tmp_path / "d", rows, cuts=(2, 30, 66))
    found = direction(tmp_path / "d", method)
    positive, negative = rows[::2, 1].astype(np.float64), rows[1::2, 1].astype(np.float64)
    expected = FROM_ROWS[method](positive, negative) if method in FROM_ROWS else REFERENCES[method](positive, negative)
    assert cosine(found, expected) > 1 - 1e-9
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_shards_cut_anywhere_give_the_bits_of_one(method: str, tmp_path: Path) -> None:
    rows = contrast(150, 20)
    write(tmp_path / "one", rows)
    write(tmp_path / "seven", rows, cuts=(2, 4, 66, 130, 194, 250))
    fits = [DumpFitter(str(tmp_path / name)).fit(9, method) for name in ("one", "seven")]
    assert fits[0].direction_D.tobytes() == fits[1].direction_D.tobytes()
    assert (fits[0].residual_norm, fits[0].separation) == (fits[1].residual_norm, fits[1].separation)
    assert fits[0].explained == fits[1].explained


@pytest.mark.parametrize("method", METHODS)
def test_unpaired_texts_give_what_needs_no_pairs(method: str, tmp_path: Path) -> None:
    rows = contrast(40)[:-2]
    write(tmp_path / "d", rows, texts=texts_of(len(rows), paired=False), paired=False)
    if method in PAIRED:
        with pytest.raises(DerivationError, match=f"{method} needs pairs; these texts have none"):
            direction(tmp_path / "d", method)
        return
    fitted = DumpFitter(str(tmp_path / "d")).fit(9, method)
    assert np.isfinite(fitted.direction_D).all()
    assert fitted.explained is None
    assert fitted.separation is None if method == "mean" else fitted.separation > 0.5


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [(("positive", "positive"), "20 positive and 0 negative"), (("", ""), "0 positive and 0 negative")],
)
def test_one_class_gives_no_direction(labels: tuple[str, str], numbers: str, tmp_path: Path) -> None:
    write(tmp_path / "d", contrast(10), texts=texts_of(20, paired=False, labels=labels), paired=False)
    with pytest.raises(DerivationError, match=f"{numbers} texts; a direction needs at least 2 of each"):
        direction(tmp_path / "d", "diffmean")


def test_rows_that_do_not_fit_in_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d", contrast(10))
    monkeypatch.setattr("steer_engine.derive.dump_fitter.MAX_ROWS_BYTES", 20 * 8 * 8 - 1)
    with pytest.raises(DerivationError, match="lda keeps all rows of a block in memory"):
        direction(tmp_path / "d", "lda")
    assert np.isfinite(direction(tmp_path / "d", "pca")).all()


def test_a_16_bit_dump_gives_nearly_the_same_direction(tmp_path: Path) -> None:
    rows = contrast(200)
    write(tmp_path / "a", rows)
    for stored, bound in (("bfloat16", 1e-4), ("float16", 1e-6)):
        write(tmp_path / stored, rows, stored=stored)
        assert (tmp_path / stored / "shard-000000.safetensors").stat().st_size < 30_000
        assert 0 < 1 - cosine(direction(tmp_path / "a", "diffmean"), direction(tmp_path / stored, "diffmean")) < bound


def vector(**about: object) -> ControlVector:
    directions = {block: np.eye(8, dtype=np.float32)[block % 8] * 5 for block in (4, 9)}
    fields = {"model": "org/model", "num_blocks": 12, "residual_norms": {4: 10.0, 9: 10.0}} | about
    return ControlVector(directions=directions, metadata=VectorMetadata.checked(fields))


def test_projections_are_components_along_the_unit_direction(tmp_path: Path) -> None:
    rows = contrast(15)
    write(tmp_path / "d", rows, cuts=(6,))
    found = project(tmp_path / "d", vector(), (4, 9))
    for place, block in enumerate((4, 9)):
        positive, negative = found[block]
        assert np.array_equal(positive, rows[::2, place, block % 8])
        assert np.array_equal(negative, rows[1::2, place, block % 8])


def test_a_dump_that_does_not_fit_the_vector_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", contrast(15))
    with pytest.raises(DerivationError, match=r"a dump of org/model .*; the vector is for org/other"):
        project(tmp_path / "d", vector(model="org/other"), (4,))
    wide = ControlVector(directions={4: np.ones(9)})
    with pytest.raises(DerivationError, match=r"hidden size 8\); the vector is for a model \(hidden size 9\)"):
        project(tmp_path / "d", wide, (4,))
    with pytest.raises(DerivationError, match=r"block 5 was not captured; the dump has \[4, 9\]"):
        project(tmp_path / "d", vector(), (5,))
    one = texts_of(30, paired=False, labels=("positive", "positive"))
    write(tmp_path / "one", contrast(15), texts=one, paired=False)
    with pytest.raises(DerivationError, match="its texts are of one class"):
        project(tmp_path / "one", vector(), (4,))


def test_the_report_shows_them(tmp_path: Path) -> None:
    write(tmp_path / "d", contrast(15))
    save(vector(), tmp_path / "v.safetensors")
    arguments = ["vectors", "report", str(tmp_path / "v.safetensors"), "--dump", str(tmp_path / "d")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "r.html")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "projection of texts at block 4" in (tmp_path / "r.html").read_text()


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """One Ray for all tests that use it; each would start its own otherwise."""
    with ray_session(None, num_cpus=2):
        yield


@pytest.mark.usefixtures("one_ray")
def test_the_command_writes_a_vector(tmp_path: Path) -> None:
    from steer_engine.cli.main import app

    rows = contrast(30)
    write(tmp_path / "d", rows, cuts=(10,))
    out = tmp_path / "v.safetensors"
    arguments = ["fit", str(tmp_path / "d"), "--out", str(out), "--method", "diffmean"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    vector = load(out)
    assert vector.digest in result.output.replace("\n", "")
    assert "held-out AUROC up to" in result.output
    for place, block in enumerate(BLOCKS):
        expected = (rows[::2, place].astype(np.float64) - rows[1::2, place]).mean(axis=0)
        assert np.abs(vector.directions[block] - expected).max() <= 2**-23 * np.abs(expected).max()
    with pytest.raises(DerivationError, match="this file exists already"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_gguf_with_block_0_is_refused_before_anything_starts(tmp_path: Path) -> None:
    from steer_engine.cli.main import app

    write(tmp_path / "d", contrast(3), blocks=[0, 9])
    arguments = ["fit", str(tmp_path / "d"), "--out", str(tmp_path / "v.gguf")]
    with pytest.raises(DerivationError, match=r"v\.gguf: llama\.cpp rejects .*dump --blocks.*\.safetensors"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.usefixtures("one_ray")
def test_a_damaged_shard_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", contrast(30), cuts=(10, 20))
    path = folder.path / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DerivationError, match=r"shard-000001\.safetensors: damaged"):
        fit_dump(folder.path, progress=False)


@pytest.mark.usefixtures("one_ray")
def test_blocks_where_the_sides_are_the_same_are_named(tmp_path: Path) -> None:
    rows = contrast(30)
    rows[::2, 1] = rows[1::2, 1]
    write(tmp_path / "d", rows)
    with pytest.raises(DerivationError, match=r"do not differ at block\(s\) 9: the direction is zero"):
        fit_dump(tmp_path / "d", progress=False)


def test_settings_are_refused_first(tmp_path: Path) -> None:
    write(tmp_path / "d", contrast(30))
    with pytest.raises(DerivationError, match="no method 'caa'"):
        fit_dump(tmp_path / "d", method="caa")
    with pytest.raises(DerivationError, match="0 actors cannot fit"):
        fit_dump(tmp_path / "d", actors=0)
    with pytest.raises(DerivationError, match="gone: not a dump folder"):
        fit_dump(tmp_path / "gone")
