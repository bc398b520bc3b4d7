from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.dumping import BLOCKS, contrast, write
from typer.testing import CliRunner

from steer_engine.derive.actors import ray_session
from steer_engine.derive.dump_fitter import fit_dump
from steer_engine.errors import DerivationError
from steer_engine.vectors import load


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """Started once for all tests of this file; each would start its own otherwise."""
    with ray_session(None, num_cpus=2):
        yield


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


def test_a_damaged_shard_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", contrast(30), cuts=(10, 20))
    path = folder.path / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DerivationError, match=r"shard-000001\.safetensors: damaged"):
        fit_dump(folder.path, progress=False)


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
