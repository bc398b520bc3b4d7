"""What replaces attention and similar layers while the probe runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steer_engine.vllm.blocks import returning_zeros

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


@pytest.mark.parametrize("by_name", [True, False])
def test_a_given_output_is_filled_with_zeros(by_name: bool) -> None:
    """LFM2 passes the output by position, Granite by name; uninitialised memory differs between rows."""
    layer, output = Convolution(), torch.full((5, 8), torch.nan)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {"output": output}) if by_name else ((output,), {})
    with returning_zeros(layer):
        layer(torch.ones(5, 8), *arguments[0], **arguments[1])
    assert torch.equal(output, torch.zeros(5, 8))


@pytest.mark.parametrize(
    ("requested", "shape"), [(torch.Size((5, 4)), (5, 4)), (None, (5, 6))], ids=["a requested shape", "all heads"]
)
def test_a_returned_output_is_zeros(requested: torch.Size | None, shape: tuple[int, ...]) -> None:
    layer = Attention()
    with returning_zeros(layer):
        answer = layer(torch.ones(5, 12), torch.ones(5, 6), output_shape=requested)
    assert torch.equal(answer, torch.zeros(shape))
    with pytest.raises(AssertionError, match="replaced"):
        layer(torch.ones(5, 12), torch.ones(5, 6))
