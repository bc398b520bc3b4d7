"""Control vectors from contrast pairs, captured on the engine that serves them.

`vector = derive("smollm2-135m", "sentiment", blocks="8-19")`, then `steer_engine.vectors.save(vector, path)`.
"""

from __future__ import annotations

from steer_engine.derive.capture_config import EngineOptions
from steer_engine.derive.condition_fit import fit_condition
from steer_engine.derive.derivation import derive
from steer_engine.derive.dump_fitter import fit_dump
from steer_engine.derive.dump_writer import dump
from steer_engine.derive.probe_fit import fit_probe, report_probe
from steer_engine.derive.texts import Pair, Pairs, Text, Texts, load_pairs, load_texts

__all__ = [
    "EngineOptions",
    "Pair",
    "Pairs",
    "Text",
    "Texts",
    "derive",
    "dump",
    "fit_condition",
    "fit_dump",
    "fit_probe",
    "load_pairs",
    "load_texts",
    "report_probe",
]
