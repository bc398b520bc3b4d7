"""Tensors from a `.pt` file, without running what else a pickle may hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_engine.errors import VectorFileError

MAX_FILE_BYTES = 1 << 30
"""Activations of a whole model in float32 fit in; anything larger is no vector."""

REEXPORT = (
    "python -c \"import torch; v = torch.load('IN.pt', weights_only=False); "
    "torch.save({int(k): t.detach().float() for k, t in v.layer_activations.items()}, 'OUT.pt')\""
)
"""Re-exports a pickled object of the steering-vectors package as the kind `layers`; run it where that package is."""

Array = npt.NDArray[np.float32]


def load_tensors(path: Path) -> Array | dict[Any, Array]:
    """The tensor in a file, or a dict of tensors, as float32.

    Raises:
        VectorFileError: no such file, too large, a pickle of code, or not tensors.
    """
    # Not imported above: the vectors package is used where there is no torch.
    torch = import_module("torch")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise VectorFileError(f"{path}: {size} bytes are more than any vector has ({MAX_FILE_BYTES}).")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise VectorFileError(f"{path}: cannot be read ({error.strerror}).") from None
    except pickle.UnpicklingError:
        raise VectorFileError(
            f"{path}: this pickle holds more than tensors, and loading it could run any code. If you trust it, and it "
            f"is of the steering-vectors package, re-export it with: {REEXPORT}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
        raise VectorFileError(f"{path}: not a file that torch.load reads.") from None
    if isinstance(loaded, Mapping):
        return {key: _array(value, torch, path) for key, value in loaded.items()}
    return _array(loaded, torch, path)


def _array(value: Any, torch: Any, path: Path) -> Array:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise VectorFileError(f"{path}: holds {found} where a floating-point tensor is expected.")
    if value.numel() * 4 > MAX_FILE_BYTES:  # a view can be far larger than its file
        raise VectorFileError(f"{path}: a tensor of shape {list(value.shape)} is no vector.")
    array: Array = value.detach().to(torch.float32).cpu().numpy()
    return array
