"""`route_rows`: interpreted kernel and reference against a loop over the requests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.kernel_process import Process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steer_kernels.reference import route_rows_reference
from steer_kernels.tables import MAX_POSITION, Tables

NUM_STATES = 9


@dataclass
class Request:
    """A request of the batch: its state index (slot - 1; -1 = unsteered in V1) and the positions of its rows."""

    state: int
    first: int
    length: int


def empty_tables(max_tokens: int) -> Tables:
    tables = Tables.allocate(
        num_slots=NUM_STATES + 1,
        num_sites=1,
        num_entries=1,
        num_rows=1,
        hidden_size=1,
        max_tokens=max_tokens,
        bank_dtype=torch.float32,
    )
    tables.slot_T.fill_(5)  # stale values of the previous step
    tables.pos_T.fill_(5)
    return tables


def expected_rows(requests: list[Request], spans: list[tuple[int, int]], max_tokens: int) -> list[tuple[int, int]]:
    rows = []
    for request in requests:
        start, end = spans[request.state + 1]
        for pos in range(request.first, request.first + request.length):
            rows.append((request.state + 1, pos) if start <= pos < end else (0, 0))
    return rows + [(0, 0)] * (max_tokens - len(rows))


def batch(requests: list[Request], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    lengths = torch.tensor([request.length for request in requests], dtype=torch.int32)
    query_start_loc_B1 = torch.zeros(len(requests) + 1, dtype=torch.int32)
    query_start_loc_B1[1:] = lengths.cumsum(0)
    idx_mapping_B = torch.tensor([request.state for request in requests], dtype=torch.int32)
    positions = [pos for request in requests for pos in range(request.first, request.first + request.length)]
    return query_start_loc_B1, idx_mapping_B, torch.tensor(positions, dtype=dtype), len(positions)


def routed(tables: Tables) -> list[tuple[int, int]]:
    return list(zip(tables.slot_T.tolist(), tables.pos_T.tolist(), strict=True))


request_lists = st.lists(
    st.builds(Request, st.integers(-1, NUM_STATES - 1), st.integers(0, 50), st.integers(0, 40)), max_size=12
)
span_lists = st.lists(
    st.sampled_from([(0, 0), (0, MAX_POSITION), (20, MAX_POSITION), (0, 20), (20, 21)]),
    min_size=NUM_STATES,
    max_size=NUM_STATES,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=request_lists, spans=span_lists, padding=st.integers(0, 200), wide=st.booleans())
def test_rows_get_the_slot_of_their_request(
    interpreted: Process, requests: list[Request], spans: list[tuple[int, int]], padding: int, wide: bool
) -> None:
    spans = [(0, 0), *spans]
    arguments = batch(requests, torch.int64 if wide else torch.int32)
    max_tokens = max(1, arguments[-1] + padding)
    expected = expected_rows(requests, spans, max_tokens)
    by_kernel, by_reference = empty_tables(max_tokens), empty_tables(max_tokens)
    for tables in (by_kernel, by_reference):
        tables.span_S2.copy_(torch.tensor(spans))
    query_start_loc_B1, idx_mapping_B, positions_T, num_tokens = arguments
    interpreted.call("route_rows.route_rows", query_start_loc_B1, idx_mapping_B, positions_T, by_kernel, num_tokens)
    route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, by_reference, num_tokens)
    assert routed(by_kernel) == expected
    assert routed(by_reference) == expected


@pytest.mark.parametrize("num_requests", [1, 2, 255, 256, 257])
def test_more_requests_than_slots(interpreted: Process, num_requests: int) -> None:
    """The binary search has enough steps for any batch size, also above the number of slots."""
    requests = [Request(state=i % NUM_STATES, first=i, length=i % 3) for i in range(num_requests)]
    spans = [(0, 0)] + [(0, MAX_POSITION)] * NUM_STATES
    arguments = batch(requests, torch.int64)
    tables = empty_tables(300)
    tables.span_S2.copy_(torch.tensor(spans))
    interpreted.call("route_rows.route_rows", *arguments[:3], tables, arguments[3])
    assert routed(tables) == expected_rows(requests, spans, 300)


def test_elements_after_the_batch_are_ignored(interpreted: Process) -> None:
    """vLLM's buffers contain stale values of longer batches after those of the current batch."""
    requests = [Request(state=2, first=7, length=3), Request(state=4, first=0, length=2)]
    query_start_loc_B1, idx_mapping_B, positions_T, num_tokens = batch(requests, torch.int64)
    stale = torch.full((5,), 3)
    tables = empty_tables(8)
    tables.span_S2.copy_(torch.tensor([(0, 0)] + [(0, MAX_POSITION)] * NUM_STATES))
    interpreted.call(
        "route_rows.route_rows",
        torch.cat([query_start_loc_B1, stale.int()]),
        idx_mapping_B,
        torch.cat([positions_T, stale]),
        tables,
        num_tokens,
    )
    assert routed(tables) == [(3, 7), (3, 8), (3, 9), (5, 0), (5, 1), (0, 0), (0, 0), (0, 0)]
