"""Steer Engine: serve steered language models on vLLM.

Importing this package imports neither vLLM nor torch; the names in `__all__` are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_engine.errors import SteerError
    from steer_engine.llm import LLM
    from steer_engine.models import resolve_model
    from steer_engine.spec import SteeringSpec
    from steer_engine.vectors.control_vector import ControlVector

__version__ = "0.1.0"

_MODULE_OF = {
    "LLM": "steer_engine.llm",
    "ControlVector": "steer_engine.vectors.control_vector",
    "SteerError": "steer_engine.errors",
    "SteeringSpec": "steer_engine.spec",
    "resolve_model": "steer_engine.models",
}

__all__ = ["LLM", "ControlVector", "SteerError", "SteeringSpec", "__version__", "resolve_model"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steer_engine' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
