"""Control vectors: the value, its files (safetensors and GGUF), and the registry."""

from __future__ import annotations

from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load, save
from steer_engine.vectors.metadata import VectorMetadata
from steer_engine.vectors.registry import Registry

__all__ = ["ControlVector", "Registry", "VectorMetadata", "load", "save"]
