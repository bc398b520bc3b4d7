"""Compile kernels ahead of time for a GPU that this machine need not have, exactly as a launch would."""

from __future__ import annotations

from typing import Any, Final

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

from steer_kernels.artifact import Artifact, inspect
from steer_kernels.edit_residual import edit_residual_kernel
from steer_kernels.launch_table import launch_for

TARGETS: Final[dict[str, GPUTarget]] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS: Final = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_kernel(
    target: str, kernel: JITFunction[Any], types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> CompiledKernel:
    """types: the arguments that aren't constants, in Triton's spelling ("*bf16", "i32").

    Pointers get the divisibility by 16 bytes that the JIT would find at a launch, since torch aligns them to more.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton_compile(source, target=TARGETS[target], options=options)


def compile_edit_residual(
    target: str,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    adds_only: bool,
    capture: bool = False,
    has_hidden: bool = True,
    bank_dtype: torch.dtype | None = None,
    num_sites: int = 32,
    num_entries: int = 4,
    num_capture_rows: int = 0,
) -> Artifact:
    """`edit_residual` as it is launched on a contiguous stream; captured rows are float32."""
    tables = ("entries_SLEW", "counts_SL", "keep_norm_S", "slot_T", "pos_T", "capture_T")
    types = dict.fromkeys(tables, "*i32") | {
        "hidden_TD": _POINTERS[dtype],
        "carried_TD": _POINTERS[dtype],
        "bank_RD": _POINTERS[bank_dtype or dtype],
        "captured_LCD": _POINTERS[torch.float32 if capture else dtype],
        "site": "i32",
    }
    launch = launch_for(hidden_size)
    constants = {
        "HIDDEN_STRIDE": hidden_size,
        "CARRIED_STRIDE": hidden_size,
        "NUM_SITES": num_sites,
        "NUM_ENTRIES": num_entries,
        "NUM_CAPTURE_ROWS": num_capture_rows,
        "HAS_HIDDEN": has_hidden,
        "ADDS_ONLY": adds_only,
        "CAPTURE": capture,
        **launch.constants(hidden_size),
    }
    options = launch.options(TARGETS[target].backend)
    return inspect(compile_kernel(target, edit_residual_kernel, types, constants, options))
