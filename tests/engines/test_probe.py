"""The startup probe on toy models with the data flow of real ones that are not what they seem.

Legend: T rows of the probe, D hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.engines import SETTINGS
from torch import nn
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from steer_engine.engine.stream import StreamForm
from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm.blocks import find_blocks, probe_forms

pytestmark = pytest.mark.v1_only  # no engine

NUM_BLOCKS = 3
CPU = torch.device("cpu")


class Attention(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the probe replaces it")


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(size), nn.RMSNorm(size)
        self.query, self.out, self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.attention = Attention()

    def attend(self, rows_TD: torch.Tensor) -> torch.Tensor:
        query_TD = self.query(rows_TD)
        attended_TD: torch.Tensor = self.out(self.attention(query_TD, query_TD, query_TD))
        return attended_TD

    def feed(self, stream_TD: torch.Tensor) -> torch.Tensor:
        fed_TD: torch.Tensor = self.down(nn.functional.silu(self.up(self.after(stream_TD))))
        return fed_TD

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        raise NotImplementedError


class Llama(Block):
    """(hidden, residual): the stream is their sum."""

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden if second is None else hidden + second
        stream = stream + self.attend(self.before(stream))
        return self.feed(stream), stream


class StableLm(Block):
    """(hidden, leftover that nobody reads)."""

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden + self.attend(self.before(hidden))
        return stream + self.feed(stream), hidden


class Beam(Block):
    """(hidden, the same, normalised for the next block's attention)."""

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden + self.attend(self.before(hidden) if second is None else second)
        stream = stream + self.feed(stream)
        return stream, self.before(stream)


class Model(nn.Module):
    """loops: how often its blocks run in one forward pass."""

    def __init__(self, form: type[Block], size: int, *, loops: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(8, size)
            self.layers = nn.ModuleList(form(size) for _ in range(NUM_BLOCKS))
        self.norm = nn.RMSNorm(size)
        self.loops = loops
        self.is_split = form is Llama

    def forward(self, *, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden, second = self.embedding(input_ids), None
        for _ in range(self.loops):
            for block in self.layers:
                hidden, second = block(hidden, second)
        final: torch.Tensor = self.norm(hidden + second if self.is_split else hidden)
        return final


@pytest.fixture
def config(tiny_llama: str) -> VllmConfig:
    return EngineArgs(model=tiny_llama, dtype="float32", enforce_eager=True, **SETTINGS).create_engine_config()


def probe(config: VllmConfig, form: type[Block], **settings: Any) -> set[StreamForm]:
    model = Model(form, config.model_config.get_hidden_size(), **settings)
    context = config.compilation_config.static_forward_context
    context.update({name: module for name, module in model.named_modules() if isinstance(module, Attention)})
    forms, _ = probe_forms(model, find_blocks(model, NUM_BLOCKS), tuple(range(NUM_BLOCKS)), config, CPU)
    return set(forms.values())


@pytest.mark.parametrize(("form", "expected"), [(Llama, StreamForm.SPLIT), (StableLm, StreamForm.HIDDEN_ONLY)])
def test_forms_are_told_apart_with_attention(config: VllmConfig, form: type[Block], expected: StreamForm) -> None:
    assert probe(config, form) == {expected}


def test_a_second_part_that_only_attention_reads_is_refused(config: VllmConfig) -> None:
    """Beam. An edit of its first part alone would miss the next block's attention."""
    with pytest.raises(UnsupportedEngineError, match=r"Beam\) carries its residual stream in no known form"):
        probe(config, Beam)


@pytest.mark.parametrize("form", [Llama, StableLm])
def test_a_model_that_loops_over_its_blocks_is_refused(config: VllmConfig, form: type[Block]) -> None:
    """Dory and IQuest-LoopCoder."""
    with pytest.raises(UnsupportedEngineError, match=rf"Block 0 \({form.__name__}\) runs 2 times in one forward pass"):
        probe(config, form, loops=2)
