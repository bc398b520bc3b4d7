"""The demo's control vector, derived once per set of inputs."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from steer_engine import __version__
from steer_engine.models import MANIFEST, cache_dir, sha256_of
from steer_engine.vectors import save

NAME = "cheerful"
METHOD = "diffmean"
BLOCKS = "8-19"
POSITION = "last"


def pairs_path() -> Path:
    """The contrast pairs that ship with the package."""
    return Path(str(files("steer_engine.derive").joinpath("data", "sentiment.jsonl")))


def vector_folder(model_path: str, dtype: str) -> Path:
    """Folder of the vector for these inputs; another model, pairs, settings or version is another folder."""
    weights = Path(model_path, MANIFEST)
    inputs = [sha256_of(weights), sha256_of(pairs_path()), METHOD, BLOCKS, POSITION, dtype, __version__]
    return cache_dir() / "demo" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def derive_once(model: str, model_path: str, dtype: str) -> Path:
    """The folder that holds the vector's file, derived if it is not there yet. `model` is what the vector calls it."""
    folder = vector_folder(model_path, dtype)
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        # Imported here: only a first run needs Ray.
        from steer_engine.derive import derive

        vector = derive(model, pairs_path(), method=METHOD, blocks=BLOCKS, position=POSITION, dtype=dtype)
        folder.mkdir(parents=True, exist_ok=True)
        save(vector, file)
    return folder
