from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.dumping import contrast, texts_of, write
from helpers.reading import REFERENCES, cosine

from steer_engine.derive.dump_fitter import DumpFitter
from steer_engine.derive.methods import FROM_ROWS, METHODS, PAIRED
from steer_engine.errors import DerivationError


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
