"""Where a model's transformer blocks are found, and what replaces attention and similar layers during the probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm.blocks import find_blocks, row_local

pytestmark = pytest.mark.v1_only  # no engine


class Attention(nn.Module):
    """Returns its output, in a shape that the caller may request."""

    num_heads, head_size = 2, 3

    def forward(self, query: torch.Tensor, key: torch.Tensor, output_shape: torch.Size | None = None) -> torch.Tensor:
        raise AssertionError("it is replaced")


class Convolution(nn.Module):
    """Writes into the output it is given, and returns nothing."""

    def forward(self, hidden: torch.Tensor, output: torch.Tensor) -> None:
        raise AssertionError("it is replaced")


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_row_local(run: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> None:
    """Each row of the answer follows its own row of the input, and no other."""
    before = run(given)
    assert before.isfinite().all()
    for row in range(len(given)):
        other = given.clone()
        other[row] += 0.5
        changed = (run(other) != before).flatten(1).any(1)
        assert changed.nonzero().squeeze(1).tolist() == [row]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_given_output_is_filled(by_name: bool) -> None:
    """LFM2 passes the output by position, Granite by name; uninitialised memory differs between rows."""
    layer = Convolution()

    def run(hidden: torch.Tensor) -> torch.Tensor:
        output = torch.full((5, 2, 6), torch.nan)
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {"output": output}) if by_name else ((output,), {})
        with row_local(layer, 5):
            layer(hidden, *arguments[0], **arguments[1])
        return output

    assert_row_local(run, rows(0, 5, 8))


@pytest.mark.parametrize(
    ("requested", "shape"), [(torch.Size((5, 4)), (5, 4)), (None, (5, 6))], ids=["a requested shape", "all heads"]
)
def test_a_returned_output_depends_on_every_input(requested: torch.Size | None, shape: tuple[int, ...]) -> None:
    layer, query, key = Attention(), rows(1, 5, 12), rows(2, 5, 6)

    def run(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        with row_local(layer, 5):
            answer: torch.Tensor = layer(query, key, output_shape=requested)
        assert answer.shape == shape
        return answer

    assert_row_local(lambda changed: run(changed, key), query)
    assert_row_local(lambda changed: run(query, changed), key)
    with pytest.raises(AssertionError, match="replaced"):
        layer(query, key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_output_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer, query = Attention(), (3e4 * rows(1, 5, 12)).to(dtype)
    with row_local(layer, 5):
        answer = layer(query, query)
    assert answer.dtype == dtype
    assert answer.abs().max() <= 1


COUNT = 4
"""Blocks of the models below."""


def tree(**children: Any) -> nn.Module:
    """A module with these children: modules, or the number of modules in a list."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, stack(child) if isinstance(child, int) else child)
    return module


def stack(count: int = COUNT) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def gemma4(*, shared: int) -> nn.Module:
    """Gemma 4: two parts of the model hold slices of its blocks; `shared` blocks reuse another block's KV cache."""
    blocks = stack()
    self_decoder, cross_decoder = (
        tree(decoder_layers=part) for part in (blocks[: COUNT - shared], blocks[COUNT - shared :])
    )
    return tree(model=tree(layers=blocks, self_decoder=self_decoder, cross_decoder=cross_decoder))


MODELS: dict[str, tuple[nn.Module, str]] = {
    "Llama": (tree(model=tree(layers=COUNT)), "model.layers"),
    "Gemma 4 without KV sharing": (gemma4(shared=0), "model.layers"),
    "Gemma 4": (gemma4(shared=2), "model.layers"),
    "ChatGLM": (tree(transformer=tree(encoder=tree(layers=COUNT))), "transformer.encoder.layers"),
    "GLM-4V": (
        tree(transformer=tree(encoder=tree(layers=COUNT), vision=tree(transformer=tree(layers=COUNT)))),
        "transformer.encoder.layers",
    ),
    "Granite Speech": (
        tree(encoder=tree(layers=COUNT), language_model=tree(model=tree(layers=COUNT))),
        "language_model.model.layers",
    ),
    "as many experts as blocks": (
        tree(model=tree(layers=nn.ModuleList(tree(experts=COUNT) for _ in range(COUNT)))),
        "model.layers",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_the_language_model_are_found(name: str) -> None:
    model, path = MODELS[name]
    assert find_blocks(model, COUNT) is model.get_submodule(path)


@pytest.mark.parametrize(
    ("model", "candidates"),
    [
        (tree(one=tree(layers=COUNT), other=tree(layers=COUNT)), "'one.layers', 'other.layers'"),
        (tree(model=tree(layers=COUNT + 1)), r"\[\]"),
        (tree(vision_tower=tree(layers=COUNT)), r"\[\]"),
    ],
    ids=["two lists", "another length", "an image encoder alone"],
)
def test_a_model_without_one_list_of_blocks_is_refused(model: nn.Module, candidates: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=candidates):
        find_blocks(model, COUNT)
