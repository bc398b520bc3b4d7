"""Control vectors from contrast pairs, read on the engine that serves them.

`vector = derive("smollm2-135m", "sentiment", blocks="8-19")`, then `steer_engine.vectors.save(vector, path)`.
"""

from __future__ import annotations

from steer_engine.derive.derive import derive
from steer_engine.derive.dump import dump
from steer_engine.derive.fit_dump import fit_dump
from steer_engine.derive.pairs import Pair, Pairs, load_pairs
from steer_engine.derive.texts import Text, Texts, load_texts

__all__ = ["Pair", "Pairs", "Text", "Texts", "derive", "dump", "fit_dump", "load_pairs", "load_texts"]
