from __future__ import annotations

import numpy as np
import pytest
import torch

from steer_engine.derive.shard import CODES, decode, encode
from steer_engine.errors import DerivationError


@pytest.mark.parametrize("name", CODES)
def test_rounding_is_torchs(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=20_000) * 10.0 ** rng.uniform(-6, 4, size=20_000)).astype(np.float32)
    rows[:3] = 0.0, -0.0, 1 + 2**-8  # a tie
    expected = torch.from_numpy(rows).to(getattr(torch, name))
    assert encode(rows, CODES[name]) == expected.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(decode(encode(rows, CODES[name]), CODES[name]), expected.float().numpy())


@pytest.mark.parametrize(("code", "value"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_what_does_not_fit_is_refused(code: str, value: float) -> None:
    with pytest.raises(DerivationError, match=f"do not fit {code}; keep float32"):
        encode(np.array([1.0, -value], dtype=np.float32), code)
