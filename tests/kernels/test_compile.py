"""Ahead-of-time compilation of the launch table's entries for every target: spills, widths and bytes.

For AMD, tests without a GPU can only compile. For NVIDIA, `test_ptx` also runs the compiled code.
"""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_process import Process
from steer_kernels.launch_table import LAUNCH_TABLE, MAX_HIDDEN_SIZE, launch_for

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Slot, count, position, and the first 16 bytes of the single entry.
SCALAR_BYTES = 4 + 4 + 4 + 16


@pytest.mark.parametrize("hidden_size", LAUNCH_TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch(compiled: Process, target: str, dtype: torch.dtype, hidden_size: int) -> None:
    """No spills; all rows in 16-byte accesses; an add moves one read of stream and bank and one write, nothing else."""
    adds = compiled.call("compile.compile_edit_residual", target, hidden_size, dtype, adds_only=True)
    general = compiled.call("compile.compile_edit_residual", target, hidden_size, dtype, adds_only=False)
    probing = compiled.call("compile.compile_edit_residual", target, hidden_size, dtype, adds_only=False, num_probes=4)
    for artifact in (adds, general, probing):
        assert artifact.spilled_bytes == 0
        assert {access.width for access in artifact.accesses if access.of_a_row} == {16}
        assert {access.is_store for access in artifact.accesses if access.of_a_row} == {False, True}
    assert adds.shared_bytes == 0, "adds must not reduce over D"
    floor = 3 * hidden_size * dtype.itemsize
    assert adds.row_bytes(hidden_size, dtype.itemsize, launch_for(hidden_size).tile) == floor
    if hidden_size >= 576:
        assert floor + SCALAR_BYTES <= 1.05 * floor


@pytest.mark.parametrize("hidden_size", [576, 3072, 5120, 7168, 12288])
@pytest.mark.parametrize("target", TARGETS)
def test_sizes_that_are_not_powers_of_two(compiled: Process, target: str, hidden_size: int) -> None:
    artifact = compiled.call("compile.compile_edit_residual", target, hidden_size, torch.bfloat16, adds_only=True)
    floor = 3 * hidden_size * 2
    assert artifact.spilled_bytes == 0
    assert {access.width for access in artifact.accesses if access.of_a_row} == {16}
    assert artifact.row_bytes(hidden_size, 2, launch_for(hidden_size).tile) + SCALAR_BYTES <= 1.05 * floor


@pytest.mark.parametrize("options", [{"capture": True}, {"bank_dtype": torch.float32}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_capture_and_a_float32_bank(
    compiled: Process, target: str, dtype: torch.dtype, options: dict[str, object]
) -> None:
    for hidden_size in (576, 4096):
        artifact = compiled.call(
            "compile.compile_edit_residual", target, hidden_size, dtype, adds_only=False, **options
        )
        assert artifact.spilled_bytes == 0
        assert {access.width for access in artifact.accesses if access.of_a_row} == {16}


@pytest.mark.parametrize("target", TARGETS)
def test_an_odd_size_compiles_without_spills(compiled: Process, target: str) -> None:
    """D = 63: bfloat16 rows are not aligned to 16 bytes, so 16-byte loads are impossible."""
    artifact = compiled.call("compile.compile_edit_residual", target, 63, torch.bfloat16, adds_only=False)
    assert artifact.spilled_bytes == 0
    assert {access.width for access in artifact.accesses if access.of_a_row} == {2}


@pytest.mark.parametrize("hidden_size", LAUNCH_TABLE)
@pytest.mark.parametrize("adds_only", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_capture_at_every_size(compiled: Process, target: str, adds_only: bool, hidden_size: int) -> None:
    artifact = compiled.call(
        *("compile.compile_edit_residual", target, hidden_size, torch.bfloat16),
        adds_only=adds_only,
        capture=True,
    )
    assert artifact.spilled_bytes == 0


@pytest.mark.parametrize("num_positions", [9, 12, 16])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("target", TARGETS)
def test_advance_triggers(compiled: Process, target: str, positions_dtype: torch.dtype, num_positions: int) -> None:
    artifact = compiled.call(
        "compile.compile_advance_triggers", target, positions_dtype=positions_dtype, num_positions=num_positions
    )
    assert artifact.spilled_bytes == 0
    assert artifact.shared_bytes == 0, "one warp needs no shared memory"
    assert not any(access.of_a_row for access in artifact.accesses)


def test_the_table_covers_every_size() -> None:
    for hidden_size in (1, 511, 512, 513, 576, 4096, 4097, MAX_HIDDEN_SIZE):
        launch = launch_for(hidden_size)
        padded = max(512, 1 << (hidden_size - 1).bit_length())
        assert LAUNCH_TABLE[padded] is launch
        # One 16-byte vector of 2-byte items for each of the 64 threads of an AMD warp.
        assert launch.tile >= launch.num_warps * 64 * 8


@pytest.mark.parametrize("hidden_size", [0, MAX_HIDDEN_SIZE + 1])
def test_unsupported_sizes_are_refused(hidden_size: int) -> None:
    with pytest.raises(ValueError, match="hidden size"):
        launch_for(hidden_size)
