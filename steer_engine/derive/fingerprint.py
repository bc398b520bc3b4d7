"""Which weights an engine has loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

_SAMPLED_BYTES = 1 << 20
"""Of the beginning and of the end of each weight file: fine-tuning changes every matrix, and hashing all would take
minutes for a large model."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def fingerprint(model: str, hf_config: Any = None) -> str:
    """`"sha256:..."` over config, sizes and samples of a checkpoint folder; a hub model's commit; empty if unknown."""
    folder = Path(model)
    if not folder.is_dir():
        return str(getattr(hf_config, "_commit_hash", None) or "")
    sha = hashlib.sha256(b"steer-engine checkpoint v1\n")
    for file in sorted(folder.iterdir()):
        if file.name == "config.json":
            sha.update(file.read_bytes())
        elif file.suffix in _WEIGHTS:
            size = file.stat().st_size
            sha.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                sha.update(stream.read(_SAMPLED_BYTES))
                stream.seek(max(0, size - _SAMPLED_BYTES))
                sha.update(stream.read(_SAMPLED_BYTES))
    return f"sha256:{sha.hexdigest()}"
