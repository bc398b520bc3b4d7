"""CUDA-graph safety, shown without a GPU: fixed addresses, no recompilation, no host sync inside the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.driving import edit, generate, steering, tokens
from helpers.engines import RUNNER

from steer_engine import LLM
from steer_engine.settings import CONFIG_KEY

STEPS = 200 if RUNNER == "v1" else 20  # a step takes seconds where every kernel is interpreted


def addresses(llm: LLM) -> dict[str, int]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runtime = worker.vllm_config.compilation_config.static_forward_context[CONFIG_KEY]
    buffers = {name: getattr(runtime.tables, name) for name in type(runtime.tables).__slots__}
    found = {name: buffer.data_ptr() for name, buffer in buffers.items() if isinstance(buffer, torch.Tensor)}
    assert len(found) >= 10
    return found


def drive(llm: LLM, steps: int) -> None:
    """Requests that come and go at different steps, steered in many ways or not at all."""
    specs: list[Any] = [
        None,
        steering(edit("r0", 0.5)),
        steering(edit("r1", scope="generation"), edit("r2", blocks=1)),
        steering(edit("r3", op="ablate")),
        steering({"vector": "r4", "op": "clamp", "lo": -1.0, "hi": 1.0}, preserve_norm=True),
    ]
    for batch in range(max(1, steps // 20)):
        prompts = [tokens(1000 * batch + i, 5 + 11 * i) for i in range(len(specs))]
        generate(llm, prompts, specs, max_tokens=20)


def test_addresses_stay_for_hundreds_of_steps(tiny: LLM) -> None:
    before = addresses(tiny)
    assert len(before) >= 6
    drive(tiny, STEPS)
    assert addresses(tiny) == before


@pytest.mark.v1_only
def test_nothing_is_compiled_again(tiny_compiled: LLM) -> None:
    from torch._dynamo.utils import counters

    drive(tiny_compiled, 20)
    frames, graphs = dict(counters["frames"]), dict(counters["stats"])
    before = addresses(tiny_compiled)
    drive(tiny_compiled, 200)
    assert dict(counters["frames"]) == frames
    assert dict(counters["stats"]) == graphs
    assert addresses(tiny_compiled) == before


@pytest.mark.v1_only
def test_the_op_is_in_the_compiled_graph(tiny_compiled: LLM) -> None:
    """Steering works on the compiled engine because the op is in its graph, not because it fell back to eager."""
    assert tiny_compiled.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    plain, steered = generate(tiny_compiled, [tokens(3, 20)] * 2, [None, steering(edit("r0", 2.0))])
    assert plain.outputs[0].token_ids != steered.outputs[0].token_ids


def test_a_block_traces_without_a_break_or_a_sync(tiny: LLM) -> None:
    """Full-graph tracing of an armed block's forward on meta tensors: any host sync or break fails here."""
    from steer_engine.engine import op

    def block_with_op(hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = hidden * 2, residual + hidden
        op.edit_residual(hidden, residual, 1)
        return hidden + 1, residual

    traced = torch.compile(block_with_op, fullgraph=True, backend="eager")
    meta = torch.empty(7, 64, device="meta")
    hidden, residual = traced(meta, meta)
    assert hidden.shape == residual.shape == (7, 64)
    graph = torch.fx.experimental.proxy_tensor.make_fx(block_with_op, tracing_mode="fake")(
        torch.zeros(7, 64), torch.zeros(7, 64)
    )
    assert sum("edit_residual" in str(node.target) for node in graph.graph.nodes) == 1
