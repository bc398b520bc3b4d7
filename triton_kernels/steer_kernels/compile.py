"""Compile kernels ahead of time as a launch would. The target GPU need not be present."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

from steer_kernels.add_rms_norm_edit import add_rms_norm_edit_kernel
from steer_kernels.advance_triggers import BLOCK as TRIGGER_BLOCK
from steer_kernels.advance_triggers import OPTIONS as TRIGGER_OPTIONS
from steer_kernels.advance_triggers import advance_triggers_kernel
from steer_kernels.artifact import Artifact, inspect
from steer_kernels.edit_residual import edit_residual_kernel
from steer_kernels.launch_table import MAX_NORMED_BYTES, launch_for
from steer_kernels.route_rows import BLOCK, OPTIONS, route_rows_kernel
from steer_kernels.tables import MAX_TRIGGER_TOKENS, MAX_TRIGGERS, TRIGGER_WORDS

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
    torch.float64: "*fp64",
}

NUM_PROBES: Final = 4
NUM_CAPTURE_ROWS: Final = 64


def every_kernel(target: str, hidden_size: int, dtype: torch.dtype) -> Iterator[tuple[str, Artifact]]:
    """Compile all kernels that an engine launches on rows of `hidden_size` items: name and compiled code.

    The general kernels have all operations, gates, windows, schedules and conditions. Probes and captures are constants
    of the compiler, so each has its own entry. `add_rms_norm_edit` is left out for rows that it does not support.
    """
    sizes = (target, hidden_size, dtype)
    probes: dict[str, Any] = {"num_probes": NUM_PROBES}
    captures: dict[str, Any] = {"capture": True, "num_capture_rows": NUM_CAPTURE_ROWS}
    yield "edit_residual, adds", compile_edit_residual(*sizes, adds_only=True)
    yield "edit_residual", compile_edit_residual(*sizes, adds_only=False)
    yield "edit_residual, one tensor", compile_edit_residual(*sizes, adds_only=False, has_hidden=False)
    yield "edit_residual, probes", compile_edit_residual(*sizes, adds_only=False, **probes)
    yield "edit_residual, probes, captures", compile_edit_residual(*sizes, adds_only=False, **{**probes, **captures})
    if hidden_size * dtype.itemsize <= MAX_NORMED_BYTES:
        yield "add_rms_norm_edit, adds", compile_add_rms_norm_edit(*sizes, adds_only=True)
        yield "add_rms_norm_edit", compile_add_rms_norm_edit(*sizes, adds_only=False)
        yield "add_rms_norm_edit, probes", compile_add_rms_norm_edit(*sizes, adds_only=False, **probes)
    yield "route_rows", compile_route_rows(target)
    yield "advance_triggers", compile_advance_triggers(target)


def compile_kernel(
    target: str, kernel: JITFunction[Any], types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> CompiledKernel:
    """types: Triton types of the arguments that are not constants ("*bf16", "i32").

    Pointers are marked as divisible by 16, as the JIT would find at a launch: torch aligns tensors to more bytes.
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
    num_probes: int = 0,
) -> Artifact:
    """Compile `edit_residual` as launched on a contiguous stream. Captured rows are float32."""
    types = _table_types(dtype, bank_dtype, capture, num_probes) | {
        "hidden_TD": _POINTERS[dtype],
        "carried_TD": _POINTERS[dtype],
    }
    launch = launch_for(hidden_size)
    constants = {
        "HIDDEN_STRIDE": hidden_size,
        "CARRIED_STRIDE": hidden_size,
        "NUM_SITES": num_sites,
        "NUM_ENTRIES": num_entries,
        "NUM_CAPTURE_ROWS": num_capture_rows,
        "NUM_PROBES": num_probes,
        "HAS_HIDDEN": has_hidden,
        "ADDS_ONLY": adds_only,
        "CAPTURE": capture,
        **launch.constants(hidden_size),
    }
    options = launch.options(TARGETS[target].backend)
    return inspect(compile_kernel(target, edit_residual_kernel, types, constants, options))


def compile_add_rms_norm_edit(
    target: str,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    adds_only: bool,
    capture: bool = False,
    bank_dtype: torch.dtype | None = None,
    num_sites: int = 32,
    num_entries: int = 4,
    num_capture_rows: int = 0,
    num_probes: int = 0,
) -> Artifact:
    """Compile `add_rms_norm_edit` as launched on contiguous rows. Captured rows are float32."""
    rows = dict.fromkeys(("hidden_TD", "residual_TD", "weight_D"), _POINTERS[dtype])
    launch = launch_for(hidden_size)
    constants = {
        "HIDDEN_STRIDE": hidden_size,
        "RESIDUAL_STRIDE": hidden_size,
        "NUM_SITES": num_sites,
        "NUM_ENTRIES": num_entries,
        "NUM_CAPTURE_ROWS": num_capture_rows,
        "NUM_PROBES": num_probes,
        "ADDS_ONLY": adds_only,
        "CAPTURE": capture,
        **launch.constants(hidden_size),
    }
    options = launch.options(TARGETS[target].backend)
    types = _table_types(dtype, bank_dtype, capture, num_probes) | rows | {"epsilon": "fp32"}
    return inspect(compile_kernel(target, add_rms_norm_edit_kernel, types, constants, options))


def compile_route_rows(target: str, *, positions_dtype: torch.dtype = torch.int64, num_slots: int = 257) -> Artifact:
    """Compile `route_rows` as launched for `num_slots` slots."""
    tensors = ("query_start_loc_B1", "idx_mapping_B", "span_S2", "slot_T", "pos_T")
    types = dict.fromkeys(tensors, "*i32") | {"positions_T": _POINTERS[positions_dtype]}
    types |= dict.fromkeys(("num_requests", "num_tokens", "num_rows"), "i32")
    constants = {"STEPS": num_slots.bit_length(), "BLOCK": BLOCK}
    return inspect(compile_kernel(target, route_rows_kernel, types, constants, OPTIONS))


def compile_advance_triggers(
    target: str, *, positions_dtype: torch.dtype = torch.int64, num_positions: int = 9
) -> Artifact:
    """Compile `advance_triggers` as launched with `num_positions` positions of history."""
    tensors = ("query_start_loc_B1", "idx_mapping_B", "input_ids_T", "triggers_SJP", "num_triggers_S", "history_SHC")
    types = dict.fromkeys((*tensors, "windows_TJ"), "*i32") | {"positions_T": _POINTERS[positions_dtype]}
    constants = {
        "J": MAX_TRIGGERS,
        "P": TRIGGER_WORDS,
        "M": MAX_TRIGGER_TOKENS,
        "H": num_positions,
        "HISTORY_BLOCK": triton.next_power_of_2(num_positions),
        "BLOCK": TRIGGER_BLOCK,
    }
    return inspect(compile_kernel(target, advance_triggers_kernel, types, constants, TRIGGER_OPTIONS))


def _table_types(dtype: torch.dtype, bank_dtype: torch.dtype | None, capture: bool, num_probes: int) -> dict[str, str]:
    tables = ("entries_SLEW", "counts_SL", "keep_norm_S", "slot_T", "pos_T", "windows_TJ", "capture_T")
    return dict.fromkeys(tables, "*i32") | {
        "measured_SQ": "*fp64",
        "bounds_SQ2": "*fp64",
        "bank_RD": _POINTERS[bank_dtype or dtype],
        "captured_LCD": _POINTERS[torch.float32 if capture else dtype],
        "probed_TK": _POINTERS[torch.float32 if num_probes else torch.float64],
        "site": "i32",
    }
