"""The start-up probe, on small models of every form in which blocks carry the residual stream.

Legend: T rows of the probe, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from steer_engine.engine.stream import ProbeRows, StreamForm, classify_output, perturb, stream_form
from steer_engine.errors import UnsupportedEngineError

HIDDEN_SIZE = 48
NUM_BLOCKS = 5


class Block(nn.Module):
    """A pre-norm block without attention, as the probe sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN_SIZE)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN_SIZE, 96), nn.SiLU(), nn.Linear(96, HIDDEN_SIZE))
        self.after = nn.RMSNorm(HIDDEN_SIZE, elementwise_affine=False)
        self.size: float | None = None
        """Gemma: each update has a size of its own (root mean square), whatever the stream's."""

    def update(self, stream: torch.Tensor) -> torch.Tensor:
        updated: torch.Tensor = self.mlp(self.norm(stream))
        return updated if self.size is None else self.size * self.after(updated)


class Split(Block):
    """Llama: the stream is hidden + residual."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        residual = hidden if residual is None else hidden + residual
        return self.update(residual), residual


class HiddenOnly(Block):
    """StableLM: the second part is a leftover that nobody reads."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return hidden + self.update(hidden), hidden


class One(Block):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return hidden + self.update(hidden)


class WithNone(One):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return super().forward(hidden, None), None


class Alone(One):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return (super().forward(hidden, None),)


class Halved(Split):
    """Reads its parts with different weights: writing into one of them would be half an edit."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return super().forward(hidden, None if residual is None else 0.5 * residual)


class Deaf(Split):
    """Hands on something that the next block does not read at all."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        hidden = self.update(torch.ones_like(hidden))
        return hidden, torch.ones_like(hidden)


class WithRouting(Split):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return (*super().forward(hidden, residual), torch.zeros(3))


class WithText(One):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return super().forward(hidden, None), "aux"


class Model(nn.Module):
    """Blocks of one form behind an embedding, and the final norm."""

    def __init__(
        self, form: type[Block], *, seed: int = 0, leading_ones: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding_D = torch.randn(HIDDEN_SIZE).to(dtype)
            self.blocks = nn.ModuleList(form() for _ in range(NUM_BLOCKS)).to(dtype)
        self.norm = nn.RMSNorm(HIDDEN_SIZE).to(dtype)
        self.leading_ones = leading_ones

    @torch.inference_mode()
    def probe(self, rows: ProbeRows, armed: Sequence[int]) -> tuple[torch.Tensor, dict[int, str]]:
        """Final hidden states float32 [T, D] of the perturbed pass, and the shapes of the armed blocks' outputs."""
        hidden = self.embedding_D.expand(*(1,) * self.leading_ones, rows.num_rows, HIDDEN_SIZE).clone()
        residual: Any = None
        noise_D = torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
        shapes = {}
        for number, block in enumerate(self.blocks):
            output = block(hidden, residual)
            if number in armed:
                shapes[number] = classify_output(output, rows, HIDDEN_SIZE)
                output = perturb(output, number, rows, noise_D)
            hidden, residual = (*output, None)[:2] if isinstance(output, tuple) else (output, None)
        split = isinstance(self.blocks[0], Split)
        final = self.norm(hidden + residual if split else hidden)
        return final.reshape(rows.num_rows, HIDDEN_SIZE).float(), shapes


def forms(model: Model, armed: Sequence[int] = range(NUM_BLOCKS)) -> list[StreamForm]:
    rows = ProbeRows(num_blocks=NUM_BLOCKS)
    final_TD, shapes = model.probe(rows, armed)
    name = type(model.blocks[0]).__name__
    return [stream_form(block, shapes[block], rows, final_TD, name) for block in armed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Split, StreamForm.SPLIT),
        (HiddenOnly, StreamForm.HIDDEN_ONLY),
        (One, StreamForm.ONE),
        (WithNone, StreamForm.ONE),
        (Alone, StreamForm.ONE),
    ],
)
def test_known_forms(form: type[Block], expected: StreamForm, seed: int, dtype: torch.dtype) -> None:
    model = Model(form, seed=seed, dtype=dtype)
    assert forms(model) == [expected] * NUM_BLOCKS
    assert forms(model, armed=[1, 4]) == [expected] * 2


GEMMA = (89.0, 36_793.0)
"""Norms of a row after the first and after the last block of Gemma 3 270M, in bfloat16."""


def growing(form: type[Block], *, first: float, last: float, outlier: float, dtype: torch.dtype) -> Model:
    """A model whose stream grows from norm `first` to `last`. outlier: value of one element of the embedding."""
    model = Model(form, dtype=dtype)
    model.embedding_D *= first / model.embedding_D.norm()
    if outlier:
        model.embedding_D[3] = outlier
    per_block = (last / first) ** (1 / NUM_BLOCKS)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.size = first * per_block ** (number + 1) / HIDDEN_SIZE**0.5
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outlier", [0.0, 30_000.0])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Split, StreamForm.SPLIT),
        (HiddenOnly, StreamForm.HIDDEN_ONLY),
        (One, StreamForm.ONE),
    ],
)
def test_a_stream_that_grows_in_a_sixteen_bit_dtype(
    form: type[Block], expected: StreamForm, outlier: float, dtype: torch.dtype
) -> None:
    """The noise is as large as the stream. Smaller noise would be lost in the dtype's rounding."""
    first, last = GEMMA
    model = growing(form, first=first, last=last, outlier=outlier, dtype=dtype)
    assert forms(model) == [expected] * NUM_BLOCKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [Halved, Deaf])
def test_a_stream_that_grows_in_no_known_form(form: type[Block], dtype: torch.dtype) -> None:
    model = growing(form, first=GEMMA[0], last=GEMMA[1], outlier=0.0, dtype=dtype)
    with pytest.raises(UnsupportedEngineError, match=form.__name__):
        forms(model, armed=[0])


def test_noise_is_as_large_as_the_stream_and_stays_in_range() -> None:
    noise_D = torch.randn(D, generator=torch.Generator().manual_seed(0))
    hidden = torch.full((T, D), 300.0, dtype=torch.float16)
    residual = torch.full((T, D), -200.0, dtype=torch.float16)
    perturbed, _ = perturb((hidden, residual), 0, ROWS, noise_D)
    added_D = (perturbed - hidden)[ROWS.row(0, 0)].float()
    assert float(added_D.norm()) == pytest.approx(float(hidden[0].float().norm()), rel=1e-2)
    hidden[:, 0] = torch.finfo(torch.float16).max
    perturbed, residual = perturb((hidden, residual), 0, ROWS, noise_D)
    assert perturbed.isfinite().all()
    assert (perturbed[0] + residual[0]).isfinite().all()


@pytest.mark.parametrize("form", [Split, HiddenOnly, One, WithNone])
def test_rows_may_be_the_second_last_axis(form: type[Block]) -> None:
    """The Transformers backend has [1, T, D]."""
    assert forms(Model(form, leading_ones=1)) == forms(Model(form))


@pytest.mark.parametrize("form", [Halved, Deaf, WithRouting, WithText])
def test_unknown_forms_are_refused_by_name(form: type[Block]) -> None:
    with pytest.raises(UnsupportedEngineError, match=form.__name__) as caught:
        forms(Model(form), armed=[0])
    assert "Block 0" in caught.value.message
    assert "unarmed" in caught.value.message


def test_rows_of_the_probe_do_not_meet() -> None:
    rows = ProbeRows(num_blocks=3)
    used = [0] + [rows.row(block, part) for block in range(3) for part in (0, 1)]
    assert sorted(used) == list(range(rows.num_rows))


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


ROWS = ProbeRows(num_blocks=2)
T, D = ROWS.num_rows, 8


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (tensor(T, D), "one"),
        (tensor(1, T, D), "one"),
        ((tensor(T, D),), "one"),
        ((tensor(T, D), None), "one"),
        ((tensor(T, D), tensor(T, D)), "pair"),
        ((tensor(1, T, D), tensor(1, T, D)), "pair"),
    ],
)
def test_shapes_that_carry_a_stream(output: Any, shape: str) -> None:
    assert classify_output(output, ROWS, D) == shape


@pytest.mark.parametrize(
    "output",
    [
        None,
        5,
        (),
        [],
        {"hidden": tensor(T, D)},
        [tensor(T, D), tensor(T, D)],
        tensor(),
        tensor(T),
        tensor(T * D),
        tensor(D, T),
        tensor(T + 1, D),
        tensor(T, D + 1),
        tensor(2, T, D),
        tensor(T, 1, D),
        tensor(T, D, 1),
        (None, tensor(T, D)),
        (None,),
        (tensor(T), None),
        (tensor(T, D), tensor(T)),
        (tensor(T, D), tensor(1, T, D)),
        (tensor(T, D), "aux"),
        (tensor(T, D), (tensor(T, D),)),
        (tensor(T, D), tensor(T, D), tensor(T, D)),
        (tensor(T, D), tensor(T, D), None),
    ],
    ids=str,
)
def test_unrelated_shapes_are_refused(output: Any) -> None:
    """Describing or perturbing such an output does not fail; the error names the class."""
    perturb(output, 0, ROWS, torch.ones(D))
    described = classify_output(output, ROWS, D)
    assert described not in ("pair", "one")
    with pytest.raises(UnsupportedEngineError, match=r"Block 1 \(OddBlock\) returns") as caught:
        stream_form(1, described, ROWS, torch.ones(T, D), "OddBlock")
    assert described in caught.value.message


def test_noise_is_in_its_own_rows_of_a_copy() -> None:
    hidden, residual = tensor(T, D), tensor(T, D)
    noise_D = torch.arange(D) + 1.0
    perturbed = perturb((hidden, residual), 1, ROWS, noise_D)
    for part, (before, after) in enumerate(zip((hidden, residual), perturbed, strict=True)):
        changed_T = (after != before).any(1)
        assert changed_T.nonzero().squeeze(1).tolist() == [ROWS.row(1, part)]
        assert torch.equal(after[ROWS.row(1, part)], noise_D)
        assert not before.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_decide_nothing(value: float) -> None:
    for row in range(T):
        final_TD = torch.ones(T, D)
        final_TD[ROWS.row(0, 0)] += 1
        final_TD[ROWS.row(0, 1)] += 1
        final_TD[row] = value
        if row in (0, ROWS.row(0, 0), ROWS.row(0, 1)):
            with pytest.raises(UnsupportedEngineError, match="no known form"):
                stream_form(0, "pair", ROWS, final_TD, "OddBlock")
        else:
            assert stream_form(0, "pair", ROWS, final_TD, "OddBlock") is StreamForm.SPLIT
    with pytest.raises(UnsupportedEngineError):
        stream_form(0, "one", ROWS, torch.full((T, D), value), "OddBlock")


def test_a_block_whose_output_changes_nothing_is_refused() -> None:
    for shape in ("pair", "one"):
        with pytest.raises(UnsupportedEngineError, match="no known form"):
            stream_form(0, shape, ROWS, torch.ones(T, D), "DeadBlock")


def test_a_stream_in_the_second_part_alone_is_refused() -> None:
    final_TD = torch.ones(T, D)
    final_TD[ROWS.row(0, 1)] += 1
    with pytest.raises(UnsupportedEngineError, match="no known form"):
        stream_form(0, "pair", ROWS, final_TD, "OddBlock")
