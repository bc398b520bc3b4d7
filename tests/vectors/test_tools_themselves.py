"""Files made by SAELens and pyreft themselves give the tools' own results, and the tools read files that we write."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import RowSet
from steer_engine.vectors.importers import Choice, import_vector
from steer_engine.vectors.reft_format import save_reft
from steer_engine.vectors.sae_formats import save_saelens

PYTHON = os.environ.get("STEER_TEST_TOOLS")
"""Python of an environment of its own: `pip install sae-lens pyreft` (checked with 6.54.12 and 0.1.0)."""

SCRIPT = Path(__file__).parents[1] / "helpers" / "tool_files.py"
F = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="needs SAELens and pyreft (STEER_TEST_TOOLS names their Python)"),
]


def tools(command: str, folder: Path) -> None:
    assert PYTHON is not None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, str(SCRIPT), command, str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    tools("make", folder)
    return folder


def expected(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = json.loads((folder / "expected.json").read_text())
    return np.array(found["x"]), np.array(found["result"])


def imported(folder: Path, *features: int) -> RowSet:
    rows = import_vector(folder, "auto", choice=Choice(features=features))
    assert isinstance(rows, RowSet)
    return rows


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Within float32 of the tool: sums of about 20 products of numbers up to 4, in another order."""
    assert np.isfinite(wanted).all()
    return bool(np.abs(found - wanted).max() <= 2.0**-23 * 20 * 16)


def activations(rows: RowSet, x_ND: np.ndarray) -> np.ndarray:
    pre = x_ND @ rows.read[3].astype(np.float64).T + rows.bias[3]
    return np.maximum(pre, 0) * (pre > rows.threshold.get(3, 0.0))


def edited(rows: RowSet, x_ND: np.ndarray) -> np.ndarray:
    """`[blocks, N, D]`."""
    results = []
    for block in rows.blocks:
        read, write, bias = (each[block].astype(np.float64) for each in (rows.read, rows.write, rows.bias))
        results.append(x_ND + (x_ND @ read.T + bias - x_ND @ write.T) @ write)
    return np.stack(results)


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("name", ["Standard", "JumpReLU", "Gated"])
def test_features_of_saelens(made: Path, name: str, subtracted: bool) -> None:
    folder = made / f"{name}-{subtracted}"
    x_ND, wanted = expected(folder)
    assert near(activations(imported(folder, *range(F)), x_ND), wanted)
    assert 0.1 < (wanted > 0).mean() < 0.9
    assert near(activations(imported(folder, 7, 39), x_ND), wanted[:, [7, 39]])


def test_top_k_features_are_refused(made: Path) -> None:
    with pytest.raises(VectorFileError, match="'topk' cannot be imported"):
        imported(made / "TopK-True", 1)


@pytest.mark.parametrize("name", ["Loreft", "Noreft", "Nodireft"])
def test_interventions_of_pyreft(made: Path, name: str) -> None:
    x_ND, wanted = expected(made / name)
    assert near(edited(imported(made / name), x_ND), wanted)
    assert np.abs(wanted - x_ND).max() > 0.1


def test_the_tools_read_what_we_write(made: Path) -> None:
    for name in ("Standard", "JumpReLU", "Gated"):
        for subtracted in (True, False):
            folder = made / f"{name}-{subtracted}"
            save_saelens(imported(folder, *range(F)), folder / "ours")
    save_reft(imported(made / "Loreft"), made / "Loreft" / "ours")
    tools("read", made)
    for ours in made.glob("*/ours"):
        assert near(expected(ours)[1], expected(ours.parent)[1]), ours
