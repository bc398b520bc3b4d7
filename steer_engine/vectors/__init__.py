"""Control vectors and row sets: the values, their files (safetensors and GGUF), and the registry."""

from __future__ import annotations

from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load, save
from steer_engine.vectors.metadata import VectorMetadata
from steer_engine.vectors.registry import Registry
from steer_engine.vectors.row_set import RowSet

__all__ = ["ControlVector", "Registry", "RowSet", "VectorMetadata", "load", "save"]
