"""Keeps the repository's folder `triton_kernels/` from being taken for the third-party package of that name.

Wraps no symbol. vLLM asks `vllm.utils.import_utils.has_triton_kernels()` when its fused-MoE modules are imported (0.32:
at model load, after the general plugins), and an importable folder without `__init__.py` is enough for a yes: it then
logs an error and turns its own MoE kernels off. An install of ours never makes the folder importable, but a process
started in the repository root (`python -c`, `python -m`, a script there, and every child spawned from one) has the root
on `sys.path`.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

_NAME = "triton_kernels"


def hide_kernel_folder() -> bool:
    """Make `import triton_kernels` fail where it would find our folder; leave a real package alone.

    True if this call hid it.
    """
    spec = _spec()
    if spec is None or not _is_our_folder(spec):
        return False
    sys.modules[_NAME] = None  # type: ignore[assignment]  # the documented way to block an import
    _forget_vllm_answers()
    return True


def _spec() -> ModuleSpec | None:
    if _NAME in sys.modules:
        return getattr(sys.modules[_NAME], "__spec__", None)  # None once hidden
    return find_spec(_NAME)


def _is_our_folder(spec: ModuleSpec) -> bool:
    """A namespace package (no file of its own) that holds `steer_kernels`."""
    return spec.origin is None and any(
        Path(folder, "steer_kernels", "__init__.py").is_file() for folder in spec.submodule_search_locations or ()
    )


def _forget_vllm_answers() -> None:
    """vLLM caches its look-ups; a yes from before the folder was hidden would make its next import of the name fail."""
    import_utils = sys.modules.get("vllm.utils.import_utils")
    for cached in ("_has_module", "get_triton_kernels_version"):
        clear = getattr(getattr(import_utils, cached, None), "cache_clear", None)
        if clear is not None:
            clear()
