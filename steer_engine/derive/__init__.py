"""Control vectors from contrast pairs, read on the engine that serves them.

`vector = derive("smollm2-135m", "sentiment", blocks="8-19")`, then `steer_engine.vectors.save(vector, path)`.
"""

from __future__ import annotations

from steer_engine.derive.derive import derive
from steer_engine.derive.pairs import Pair, Pairs, load_pairs

__all__ = ["Pair", "Pairs", "derive", "load_pairs"]
