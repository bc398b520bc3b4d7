from __future__ import annotations

import numpy as np
import pytest
from steer_bench.questions.derive import FEWEST_WORDS, MOST_WORDS, NUM_TEXTS, cosines, ragged_texts


def test_texts_have_varied_lengths_and_depend_on_the_seed() -> None:
    texts = ragged_texts(NUM_TEXTS)
    assert len(texts) == NUM_TEXTS >= 400
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[0] == FEWEST_WORDS
    assert lengths[-1] > 0.95 * MOST_WORDS
    assert lengths[len(lengths) // 4] * 2 < lengths[3 * len(lengths) // 4]
    assert texts == ragged_texts(NUM_TEXTS)
    assert texts != ragged_texts(NUM_TEXTS, seed=1)


def test_cosines_are_per_text_and_block() -> None:
    rows_NLD = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    turned_NLD = rows_NLD.copy()
    turned_NLD[1, 0] *= -2
    np.testing.assert_allclose(cosines(rows_NLD, turned_NLD), [[1, 1], [-1, 1], [1, 1]], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="cannot be compared"):
        cosines(rows_NLD, rows_NLD[:2])
