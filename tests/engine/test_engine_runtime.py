"""One engine's state, driven step by step as a model runner does, on the CPU.

Legend: see `steer_kernels.tables`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_specs import HIDDEN_SIZE, NUM_BLOCKS, VECTORS, as_compiled, resolved, specs
from helpers.stepping import changed, edited, new_runtime, program, route, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_kernels.reference import edit_residual_reference

from steer_engine.monitor import Watched
from steer_engine.program import Program
from steer_engine.spec import Op

U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_only_rows_of_steered_requests_change() -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(3, program({"scope": "generation", "op": "ablate"}))
    hidden, carried = stream()
    route(runtime, (0, 0, 3), (3, 0, 5), (1, 9, 2), (2, 0, 4))
    assert changed(carried, edited(runtime, hidden, carried)) == [6, 7, 8, 9]
    runtime.release(1)
    route(runtime, (0, 0, 3), (3, 0, 5), (1, 9, 2), (2, 0, 4))
    assert changed(carried, edited(runtime, hidden, carried)) == [6, 7]
    runtime.release(3)
    route(runtime, (0, 0, 3), (3, 0, 5), (1, 9, 2), (2, 0, 4))
    assert torch.equal(edited(runtime, hidden, carried), carried)


def test_blocks_map_to_sites_in_order() -> None:
    runtime = new_runtime(blocks=(3, 1))
    assert runtime.armed_blocks == (1, 3)
    runtime.admit(1, program({"blocks": 3}))
    hidden, carried = stream()
    route(runtime, (1, 0, 2))
    assert changed(carried, edited(runtime, hidden, carried, site=0)) == []
    assert changed(carried, edited(runtime, hidden, carried, site=1)) == [0, 1]


def test_a_dummy_pass_edits_nothing() -> None:
    runtime = new_runtime(capture_blocks=(0,))
    runtime.admit(1, program({}))
    hidden, carried = stream()
    route(runtime, (1, 0, 4))
    runtime.capture([0, 1], [False, False])
    runtime.idle()
    assert torch.equal(edited(runtime, hidden, carried), carried)
    assert not runtime.tables.slot_T.any()
    assert not runtime.captured(2).any()
    route(runtime, (1, 0, 4))
    assert changed(carried, edited(runtime, hidden, carried)) == [0, 1, 2, 3]


def test_a_step_forgets_the_one_before() -> None:
    """Rows steered in a long step are not steered in a short one, nor in one of other requests."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, program({"op": "ablate"}))
    hidden, carried = stream()
    for requests, expected in (
        ([(1, 0, 10), (2, 0, 5)], list(range(15))),
        ([(2, 5, 1)], [0]),
        ([(0, 0, 8)], []),
        ([(0, 0, 2), (1, 10, 1)], [2]),
    ):
        route(runtime, *requests)
        assert changed(carried, edited(runtime, hidden, carried)) == expected


MIXES = [
    [program({"scale": 0.5})],
    [program({"scale": 0.5}), program({"op": "ablate"})],
    [program({"scale": 0.5}), program({"scale": 2.0}, preserve_norm=True)],
    [program({"scale": 0.5}), program({"scale": 2.0, "gate": {"vector": "c", "min_cos": 0.0}})],
    [program({"op": "add_relative", "scale": 0.5})],
    [program({"op": "set", "target": 2.0}, {"scale": 1.0})],
    [program({"op": "clamp", "lo": 1.0})],
    [program({"scale": 1.0}, {"vector": "b", "scope": "generation"}), program({"scale": -1.0, "scope": "prompt"})],
]


@pytest.mark.parametrize("mix", MIXES, ids=range(len(MIXES)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_whatever_way_is_taken_the_bits_are_those_of_the_reference(
    mix: list[Program], dtype: torch.dtype, split: bool, batched: bool, padded: bool
) -> None:
    """A step of adds alone is worked out in advance; the reference walks the tables at every site."""
    runtime = new_runtime(dtype=dtype)
    for slot, admitted in enumerate(mix, start=1):
        runtime.admit(slot, admitted)
    requests = [(1, 0, 7), *([(2, 3, 5)] if len(mix) > 1 else []), *([(0, 0, 2)] if padded else [])]
    hidden, carried = stream(dtype, rows=sum(count for *_, count in requests) + 3 * padded)
    if batched:
        hidden, carried = hidden[None], carried[None]
    route(runtime, *requests[::-1])
    for site in range(NUM_BLOCKS):
        got, expected = edited(runtime, hidden if split else None, carried, site), carried.clone()
        edit_residual_reference(hidden if split else None, expected, runtime.tables, site, adds_only=False)
        assert torch.equal(got, expected)
        assert not torch.equal(got, carried)


def test_a_neighbour_that_needs_more_than_adds_does_not_show() -> None:
    """Invariant 2 of the design: the rows of one request are the same bits whatever the others ask."""
    for dtype in DTYPES:
        hidden, carried = stream(dtype)
        seen = set()
        for neighbour in (None, program({}), program({"op": "ablate"}), program({"op": "set", "target": 9.0})):
            runtime = new_runtime(dtype=dtype)
            runtime.admit(1, program({"scale": 0.3}, {"vector": "c", "scale": -1.1, "scope": "generation"}))
            if neighbour is not None:
                runtime.admit(2, neighbour)
            route(runtime, (1, 0, 8), (2, 0, 8))
            seen.add(edited(runtime, hidden, carried)[:8].float().numpy().tobytes())
        assert len(seen) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(specs(max_edits=3, ops=tuple(Op)), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 2**16))
def test_steps_of_any_programs(raws: list[Any], prompt_len: int, seed: int) -> None:
    compiled = [resolved(raw).template.at(prompt_len) for raw in raws]
    runtime = new_runtime()
    for slot, admitted in enumerate(compiled, start=1):
        runtime.admit(slot, admitted)
    hidden, carried = stream(seed=seed)
    route(runtime, *((slot, slot, 5) for slot in range(1, len(raws) + 1)))
    for block in range(NUM_BLOCKS):
        after, expected = edited(runtime, hidden, carried, block), carried.clone()
        edit_residual_reference(hidden, expected, runtime.tables, block, adds_only=False)
        assert torch.equal(after, expected)
        for slot, admitted in enumerate(compiled, start=1):
            if any(entry.gate for group in admitted.sites for entry in group.entries):
                continue
            row, position = 5 * (slot - 1) + 2, slot + 2
            x_D = (hidden[row].double() + carried[row].double()).numpy()
            want_D, error = as_compiled(admitted, x_D, block, position, U32)
            got_D = (hidden[row].double() + after[row].double()).numpy()
            error += U32 * float(after[row].double().norm())
            assert np.linalg.norm(got_D - want_D) <= error


def test_adds_only_engines_take_the_short_way() -> None:
    runtime = new_runtime(ops=("add",))
    runtime.admit(1, program({"scale": 0.5}, {"vector": "b", "scope": "prompt"}))
    hidden, carried = stream()
    route(runtime, (1, 0, 8))
    expected = carried.clone()
    edit_residual_reference(hidden, expected, runtime.tables, 1, adds_only=True)
    assert torch.equal(edited(runtime, hidden, carried, 1), expected)
    assert changed(carried, expected) == list(range(8))


# Capture


@pytest.mark.parametrize(("ops", "adds_only"), [(("add",), True), (("add", "ablate"), False)])
def test_the_kernel_is_launched_for_what_is_armed(
    monkeypatch: pytest.MonkeyPatch, ops: tuple[str, ...], adds_only: bool
) -> None:
    """`ADDS_ONLY` is the kernel whose compiled code holds no reduction (tests/kernels/test_compile.py)."""
    launched: list[bool] = []
    monkeypatch.setattr(
        "steer_kernels.edit_residual.edit_residual", lambda *args, adds_only, capture: launched.append(adds_only)
    )
    runtime = new_runtime(ops=ops)
    runtime.use_triton = True
    runtime.edit(*stream(), 0)
    assert launched == [adds_only]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_captured_before_they_are_edited(dtype: torch.dtype) -> None:
    runtime = new_runtime(capture_blocks=(1, 2), dtype=dtype)
    runtime.admit(1, program({}))
    hidden, carried = stream(dtype)
    route(runtime, (1, 0, 6), (0, 0, 4))
    runtime.capture([5, 0, 8], [False] * 3)
    for site in range(NUM_BLOCKS):
        after = edited(runtime, hidden * site, carried, site)
        assert changed(carried, after) == list(range(6))
    found_LCD = runtime.captured(3)
    assert found_LCD.shape == (2, 3, HIDDEN_SIZE)
    assert found_LCD.dtype == torch.float32
    for place, site in enumerate((1, 2)):
        assert torch.equal(found_LCD[place], ((hidden * site).float() + carried.float())[[5, 0, 8]])


def test_capture_without_steering() -> None:
    runtime = new_runtime(capture_blocks=(0,))
    hidden, carried = stream()
    route(runtime, (0, 0, 6))
    runtime.capture([2], [False])
    assert torch.equal(edited(runtime, None, carried), carried)
    assert torch.equal(runtime.captured(1)[0, 0], carried[2])
    runtime.capture([], [])
    edited(runtime, hidden, carried)
    assert torch.equal(runtime.captured(1)[0, 0], carried[2]), "no row was requested, none was captured"


def test_a_capture_does_not_change_what_is_computed() -> None:
    hidden, carried = stream(torch.bfloat16)
    seen = []
    for rows in ([], [0, 3]):
        runtime = new_runtime(capture_blocks=(0,), dtype=torch.bfloat16)
        runtime.admit(1, program({"scale": 0.5}))
        route(runtime, (1, 0, 4))
        runtime.capture(rows, [False] * len(rows))
        seen.append(edited(runtime, hidden, carried))
    assert torch.equal(*seen)


# Memory


def test_addresses_never_change() -> None:
    """A CUDA graph holds them."""
    runtime = new_runtime(capture_blocks=(1,))
    parts = {name: getattr(runtime.tables, name) for name in type(runtime.tables).__slots__}
    tensors = {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}
    assert parts.keys() - tensors.keys() == {"capture_places"}
    before = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in tensors.items()}
    hidden, carried = stream()
    for step in range(50):
        slot = step % 3 + 1
        runtime.release(slot)
        runtime.admit(slot, program({"scale": 1 + step / 10}, {"op": "ablate"}, prompt_len=step + 1))
        route(runtime, *((slot, step, 1 + step % 5) for slot in (1, 2, 3)))
        runtime.capture([step % 3], [False])
        edited(runtime, hidden, carried, step % NUM_BLOCKS)
        runtime.idle()
    for name, tensor in tensors.items():
        assert getattr(runtime.tables, name) is tensor
        assert (tensor.data_ptr(), tensor.shape, tensor.stride()) == before[name]


def test_the_bank_has_room_for_all_that_requests_may_need() -> None:
    runtime = new_runtime(rows=2)
    assert runtime.bank.num_rows == 3 * NUM_BLOCKS * 2
    names = "abcd"
    for slot in (1, 2, 3):
        edits = [{"vector": names[slot - 1], "scale": 1.0}, {"vector": names[slot], "op": "ablate"}]
        runtime.admit(slot, program(*edits))
    assert runtime.bank.num_pinned > 12


def test_bytes_are_those_of_all_buffers() -> None:
    runtime = new_runtime()
    assert runtime.num_bytes < new_runtime(capture_blocks=(1,)).num_bytes
    assert runtime.num_bytes >= runtime.tables.bank_RD.nbytes + runtime.tables.entries_SLEW.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_monitors_measure_everybody_and_change_nobody(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain, a steered, and a steered and probed request: prompts that end at position 3, and decoding."""
    monkeypatch.setenv("STEER_ENGINE_MONITORS", "x=c:1 y=a:1:dot")
    watched = Watched(numbers=((VECTORS["c"].digest, 1, "cosine"), (VECTORS["a"].digest, 1, "dot")))
    edit = {"op": "add", "scale": 2.0}
    own = {"probes": [{"name": "p", "vector": "b", "blocks": [1], "after": True}]}
    same = [{"name": "x", "vector": "c", "blocks": [1]}, {"name": "y", "vector": "a", "blocks": [1], "measure": "dot"}]
    programs = [None, program(edit), program(edit, **own)]
    asking = [
        resolved({"probes": same}).template.at(4),
        program(edit, probes=same),
        program(edit, probes=[*own["probes"], *same]),
    ]
    runtimes = [new_runtime(dtype=dtype) for _ in range(3)]
    plain, watching, asked = runtimes
    watching.watch(watched)
    for slot, (mine, theirs) in enumerate(zip(programs, asking, strict=True), start=1):
        if mine is not None:
            plain.admit(slot, mine)
        watching.admit(slot, watched.added_to(mine, 4))
        asked.admit(slot, theirs)
    assert watching.programs.num_steered == 2
    for requests in ([(1, 0, 4), (2, 2, 2), (3, 0, 3)], [(1, 4, 1), (2, 4, 1), (3, 3, 1)], [(1, 5, 1), (2, 5, 1)]):
        hidden, carried = stream(dtype, seed=len(requests))
        streams = []
        for runtime in runtimes:
            route(runtime, *requests)
            streams.append([edited(runtime, hidden, carried, site) for site in range(NUM_BLOCKS)])
        for mine, theirs in zip(streams[0], streams[1], strict=True):
            assert torch.equal(mine, theirs)
        rows = torch.arange(sum(count for _, _, count in requests))
        numbers_NK, expected_NK = watching.probed(rows, 3), asked.probed(rows, 3)
        assert torch.equal(numbers_NK.nan_to_num(nan=9e9), expected_NK.nan_to_num(nan=9e9))
        measured = [first + row >= 3 for _, first, count in requests for row in range(count)]
        column_of = [2 if slot == 3 else 1 for slot, _, count in requests for _ in range(count)]
        found = [bool(numbers_NK[row, column].isfinite()) for row, column in enumerate(column_of)]
        assert found == measured
