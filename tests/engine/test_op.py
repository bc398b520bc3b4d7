"""The custom op: registered soundly, traced in one graph, and its mutation seen by functionalization.

Legend: T rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.stepping import HIDDEN_SIZE, MAX_TOKENS, new_runtime, program, route, stream
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from steer_engine.engine import op

OP = torch.ops.steer_engine.edit_residual.default
Model = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A runtime that the op finds, with rows 0 to 5 of the coming step steered."""
    runtime = new_runtime()
    runtime.admit(1, program({"scale": 0.7}))
    runtime.admit(2, program({"op": "ablate"}))
    route(runtime, (1, 0, 3), (2, 0, 3))
    monkeypatch.setattr(op, "_running", lambda: runtime)
    torch._dynamo.reset()
    yield runtime
    torch._dynamo.reset()


def model(hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two split blocks with the op behind each, as Llama has them: what follows reads the edited stream."""
    for site in range(2):
        op.edit_residual(hidden, residual, site)
        residual = hidden + residual
        hidden = torch.nn.functional.silu(residual) * 0.5
    op.edit_residual(hidden, residual, 2)
    return hidden, residual


def hidden_only(hidden: torch.Tensor, leftover: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stream = hidden * 1.0
    op.edit_residual(None, stream, 1)
    return stream + 1.0, leftover


def run(model: Model, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both results, and what became of the residual that was given."""
    given = residual.clone()
    return (*model(hidden.clone(), given), given)


def test_the_schema_says_what_is_written() -> None:
    hidden, carried, site = OP._schema.arguments
    assert carried.alias_info is not None
    assert carried.alias_info.is_write
    assert hidden.alias_info is None
    assert OP._schema.returns == []
    assert site.name == "site"


@pytest.mark.parametrize("with_hidden", [True, False])
@pytest.mark.parametrize("shape", [(MAX_TOKENS, HIDDEN_SIZE), (1, MAX_TOKENS, HIDDEN_SIZE)])
def test_opcheck(runtime: Any, with_hidden: bool, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape) if with_hidden else None
    torch.library.opcheck(OP, (hidden, torch.randn(shape), 1))


def test_the_op_edits_what_its_runtime_says(runtime: Any) -> None:
    hidden, residual = stream()
    given = residual.clone()
    op.edit_residual(hidden, given, 0)
    assert (given != residual).any(1).nonzero().squeeze(1).tolist() == list(range(6))
    expected = residual.clone()
    runtime.edit(hidden, expected, 0)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("function", [model, hidden_only])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph_it_is_the_same_bits(runtime: Any, backend: str, function: Model) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for rows in (MAX_TOKENS, 8, 13):
        hidden, residual = stream(seed=rows, rows=rows)
        eager, traced = run(function, hidden, residual), run(compiled, hidden, residual)
        for one, other in zip(eager, traced, strict=True):
            assert torch.equal(one, other)
        plain = run(unedited(function), hidden, residual)
        assert not torch.equal(plain[0], traced[0]) or not torch.equal(plain[1], traced[1])
    assert counter.frame_count <= 2, "one graph for a first size, one for all"


def unedited(function: Model) -> Model:
    """The same without the op."""

    def plain(hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before, op.edit_residual = op.edit_residual, lambda *_: None  # type: ignore[assignment]
        try:
            return function(hidden, residual)
        finally:
            op.edit_residual = before

    return plain


def test_what_changes_between_steps_compiles_nothing(runtime: Any) -> None:
    """Other programs and requests, with or without a capture: the graph reads buffers and does not depend on them."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    hidden, residual = stream(rows=8)
    compiled(hidden.clone(), residual.clone())
    frames = counter.frame_count
    for step in range(6):
        runtime.release(1 + step % 2)
        runtime.admit(1 + step % 2, program({"scale": step + 1.0}, {"op": "ablate", "scope": "generation"}))
        route(runtime, (step % 3, step, 4), (2, 0, 4))
        eager, traced = run(model, hidden, residual), run(compiled, hidden, residual)
        assert all(torch.equal(one, other) for one, other in zip(eager, traced, strict=True))
        runtime.idle()
        silent = run(compiled, hidden, residual)
        assert torch.equal(silent[2], residual)
    assert counter.frame_count == frames


def test_tracing_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta and fake tensors, as where a graph is made without a device: no runtime is needed."""
    monkeypatch.setattr(op, "_running", None)
    shape = (MAX_TOKENS, HIDDEN_SIZE)
    meta = [torch.empty(shape, device="meta") for _ in range(2)]
    hidden, residual = model(*meta)
    assert hidden.shape == residual.shape == shape
    with FakeTensorMode():
        hidden, residual = model(torch.empty(shape), torch.empty(shape))
        assert hidden.shape == shape
    graph = make_fx(model, tracing_mode="symbolic")(torch.empty(shape), torch.empty(shape)).graph
    edits = [node for node in graph.nodes if node.target is OP]
    assert [node.args[2] for node in edits] == [0, 1, 2]


def test_dead_code_elimination_keeps_the_op(runtime: Any) -> None:
    """It returns nothing: only its mutation holds it in the graph."""
    graph = make_fx(model)(*stream())
    graph.graph.eliminate_dead_code()
    assert sum(node.target is OP for node in graph.graph.nodes) == 3
