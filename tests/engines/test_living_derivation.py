"""`derive` and its like on a living engine: the same numbers as its own captures, and no engine is started."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

from steer_engine import LLM
from steer_engine.derive import derive, dump, fit_condition, fit_probe
from steer_engine.errors import DerivationError
from steer_engine.vectors import load

PAIRS = [(f"what a good day {number}", f"how bad is room {number}") for number in range(12)]
BOUND = 8 * 2.0**-23
"""Of the largest row: a mean of 12 rows, in another order, in float32 and float64."""


def mean_difference(llm: LLM, block: int, site: str = "block") -> np.ndarray:
    sides = [llm.capture([pair[side] for pair in PAIRS], "last", site=site) for side in (0, 1)]
    index = llm.capture_blocks.index(block)
    means = [np.mean([rows_LPD[index, 0] for rows_LPD in rows], axis=0, dtype=np.float64) for rows in sides]
    return np.asarray(means[0] - means[1])


def test_a_living_engine_derives_what_it_captures(tiny: LLM, tmp_path: Path) -> None:
    as_mappings = [{"positive": positive, "negative": negative} for positive, negative in PAIRS]
    out = tmp_path / "v.safetensors"
    vector = derive(tiny, as_mappings, blocks=[0, 2], out=out, progress=False)
    assert vector.blocks == (0, 2)
    assert load(out) == vector
    for block in (0, 2):
        expected = mean_difference(tiny, block)
        size = float(np.abs(np.concatenate(tiny.capture([pair[0] for pair in PAIRS], "last"))).max())
        assert np.abs(vector.directions[block] - expected).max() <= BOUND * size
        assert np.abs(expected).max() > 100 * BOUND * size
    assert derive(tiny, iter(PAIRS), blocks="0", progress=False).digest != vector.digest
    assert not ray.is_initialized()
    assert tiny.generate("still up", use_tqdm=False)


def test_the_other_functions_take_it_too(tiny: LLM, tmp_path: Path) -> None:
    vector = derive(tiny, PAIRS, blocks="0-1", progress=False)
    folder = dump(tiny, PAIRS, tmp_path / "dump", blocks="0-1", progress=False)
    assert folder.manifest.num_texts == 2 * len(PAIRS)
    good, bad = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]
    assert fit_condition(tiny, vector, good, bad, progress=False).chosen.held_out.auroc > 0.5
    assert fit_probe(tiny, good, bad, method="diffmean", blocks="1", progress=False).vector.blocks == (1,)
    with pytest.raises(DerivationError, match="positive prompts:2: a prompt is text"):
        fit_condition(tiny, vector, [good[0], ""], bad, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_a_vector_of_outputs(tiny_sites: LLM, tmp_path: Path, site: str) -> None:
    """Derived at a site, dumped and fitted there, applied there by default; its norms are of the stream."""
    out = tmp_path / "v.safetensors"
    vector = derive(tiny_sites, PAIRS, blocks=[0, 2], site=site, out=out, progress=False)
    about = load(out).metadata
    assert about.site == site
    for block in (0, 2):
        expected = mean_difference(tiny_sites, block, site)
        assert np.abs(vector.directions[block] - expected).max() <= BOUND * max(1.0, float(np.abs(expected).max()))
        assert np.abs(expected - mean_difference(tiny_sites, block)).max() > 1e-3
    assert about.residual_norms == derive(tiny_sites, PAIRS, blocks=[0, 2], progress=False).metadata.residual_norms
    dumped = dump(tiny_sites, PAIRS, tmp_path / "dump", blocks=[0, 2], site=site, progress=False)
    rows = dumped.require_complete()[0].rows_RD(2)
    assert np.array_equal(rows[0], tiny_sites.capture([PAIRS[0][0]], site=site)[0][2, 0])
    good, bad = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]
    fitted = fit_condition(tiny_sites, vector, good, bad, blocks=2, measure="dot", progress=False)
    assert fitted.chosen.held_out.auroc > 0.5
    probe = fit_probe(tiny_sites, good, bad, method="diffmean", blocks="2", site=site, progress=False)
    assert probe.vector.metadata.site == site
    tiny_sites.vectors.add("derived", vector)
    prompt = PAIRS[0][0]
    spec = {"edits": [{"vector": "derived", "scale": 3.0}]}
    after = tiny_sites.capture([prompt], site=site, steering=spec, after=True)[0]
    before = tiny_sites.capture([prompt], site=site, steering=spec)[0]
    for block in (0, 2):
        moved = after[block, 0] - before[block, 0]
        assert np.allclose(moved, 3.0 * vector.directions[block], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_a_living_engine_is_refused(tiny: LLM) -> None:
    with pytest.raises(DerivationError, match="captures blocks 0-2, and not 7"):
        derive(tiny, PAIRS, blocks=[2, 7], progress=False)
    with pytest.raises(DerivationError, match=r"does not arm site 'mlp'; make it with .*sites=\('mlp',\)"):
        derive(tiny, PAIRS, site="mlp", progress=False)
    with pytest.raises(DerivationError, match="leave them out with a living LLM"):
        derive(tiny, PAIRS, actors=2)
