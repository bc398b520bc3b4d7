"""Measures the effect and the side effects of a vector on one engine: accuracy, KL, entropy and probability mass
against strength, with separate splits, controls and confidence intervals.

`evaluate`, `sweep` and `calibrate` are the commands `eval` and `calibrate` as functions, for notebooks.
"""

from __future__ import annotations

from steer_engine.evaluate.items import Item, Sizes, Task
from steer_engine.evaluate.outcome import Outcome, Sweep
from steer_engine.evaluate.studies import Calibration, Settings, calibrate, evaluate, sweep
from steer_engine.evaluate.tasks import load_task

__all__ = [
    "Calibration",
    "Item",
    "Outcome",
    "Settings",
    "Sizes",
    "Sweep",
    "Task",
    "calibrate",
    "evaluate",
    "load_task",
    "sweep",
]
