"""Which module of a block is a site, on toy models with the data flow of real ones; and the edits of one.

Legend: T rows of the probe, D hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engines import SETTINGS
from torch import nn
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from steer_engine.engine import op
from steer_engine.engine.stream import StreamForm
from steer_engine.errors import UnsupportedEngineError
from steer_engine.site import SITES_IN_BLOCKS, Site, points_at
from steer_engine.vllm import sites
from steer_engine.vllm.arming import _edited_part
from steer_engine.vllm.sites import SiteModule, find_site_modules

pytestmark = pytest.mark.v1_only  # no engine

NUM_BLOCKS = 3
CPU = torch.device("cpu")
ATTN, MLP = (points_at(range(NUM_BLOCKS), site) for site in SITES_IN_BLOCKS)


class RawAttention(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the probe replaces it")


class Attention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.out = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.attn = RawAttention()

    def forward(self, rows_TD: torch.Tensor) -> Any:
        query_TD = self.query(rows_TD)
        return self.out(self.attn(query_TD, query_TD, query_TD))


class Feed(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(2))

    def forward(self, rows_TD: torch.Tensor) -> Any:
        return self.down(nn.functional.silu(self.up(rows_TD)))


class Tuple(Attention):
    def forward(self, rows_TD: torch.Tensor) -> Any:
        return super().forward(rows_TD), None


class InPlace(Feed):
    """Writes over its input and returns it, as some kernels for experts do."""

    def forward(self, rows_TD: torch.Tensor) -> Any:
        return rows_TD.copy_(super().forward(rows_TD))


class Narrow(Attention):
    def forward(self, rows_TD: torch.Tensor) -> Any:
        return super().forward(rows_TD)[..., :8]


class Filling(Attention):
    """Fills a buffer and returns nothing."""

    def forward(self, rows_TD: torch.Tensor) -> Any:
        self.filled = super().forward(rows_TD)


class Llama(nn.Module):
    """(hidden, residual): the stream is their sum."""

    form = StreamForm.SPLIT
    attention: type[nn.Module] = Attention
    feed: type[nn.Module] = Feed
    scale = 1.0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(size), nn.RMSNorm(size)
        self.self_attn, self.mlp = self.attention(size), self.feed(size)

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden if second is None else hidden + second
        attended = self.self_attn(self.before(stream))
        stream = stream + (attended[0] if isinstance(attended, tuple) else attended)
        return self.mlp(self.after(stream)), stream


class Tuples(Llama):
    attention = Tuple


class OverItsInput(Llama):
    feed = InPlace


class Bounded(Llama):
    """Norms the output of its MLP in a function: its direction arrives as it is, and its size does not."""

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        output, stream = super().forward(hidden, second)
        return nn.functional.rms_norm(output.float(), output.shape[-1:]).to(output.dtype), stream


class Deferred(Llama):
    """Its experts leave their sum over the ranks to a later kernel."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.mlp.moe_config = SimpleNamespace(skip_final_all_reduce=True)  # type: ignore[assignment]


class TooNarrow(Llama):
    attention = Narrow

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden if second is None else hidden + second
        stream = stream + nn.functional.pad(self.self_attn(self.before(stream)), (0, stream.shape[-1] - 8))
        return self.mlp(self.after(stream)), stream


class Silent(Llama):
    attention = Filling

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden if second is None else hidden + second
        self.self_attn(self.before(stream))
        stream = stream + self.self_attn.filled
        return self.mlp(self.after(stream)), stream


class NeoX(Llama):
    """One tensor; attention and MLP read the same stream."""

    form = StreamForm.ONE

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        return hidden + self.self_attn(self.before(hidden)) + self.mlp(self.after(hidden)), None


class Gemma(Llama):
    """A norm of each output, which is what is added."""

    form = StreamForm.ONE

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.post_attention_norm, self.post_feed_norm = nn.RMSNorm(size), nn.RMSNorm(size)

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        hidden = hidden + self.post_attention_norm(self.self_attn(self.before(hidden)))
        return hidden + self.post_feed_norm(self.mlp(self.after(hidden))), None


class AddsInPlace(Llama):
    """The attention's output becomes the stream, in place; a norm of it is no norm of the output."""

    form = StreamForm.ONE

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        attended = self.self_attn(self.before(hidden))
        attended += hidden
        return attended + self.mlp(self.after(attended)), None


class Granite(Llama):
    """Outputs are multiplied by a constant."""

    form = StreamForm.ONE

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        hidden = hidden + 0.3 * self.self_attn(self.before(hidden))
        return hidden + 0.3 * self.mlp(self.after(hidden)), None


class Mamba(nn.Module):
    """Neither attention nor MLP."""

    form = StreamForm.ONE

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(size), Feed(size)

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        return hidden + self.mixer(self.norm(hidden)), None


class Projected(Llama):
    """Attention and MLP share one output projection: neither output is added as it is."""

    form = StreamForm.ONE

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        rows_TD = self.before(hidden)
        return hidden + self.out(self.self_attn(rows_TD) + self.mlp(rows_TD)), None


class TwoMlps(Llama):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.shared_mlp = Feed(size)

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        fed, stream = super().forward(hidden, second)
        return fed + self.shared_mlp(self.after(stream)), stream


class Skips(Llama):
    """Calls its MLP by another way than the module."""

    def forward(self, hidden: torch.Tensor, second: torch.Tensor | None) -> Any:
        stream = hidden if second is None else hidden + second
        stream = stream + self.self_attn(self.before(stream))
        return self.mlp.forward(self.after(stream)), stream


class Model(nn.Module):
    def __init__(self, form: type[Any], size: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(8, size)
            self.layers = nn.ModuleList(form(size) for _ in range(NUM_BLOCKS))
        self.is_split = form.form is StreamForm.SPLIT

    def forward(self, *, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden, second = self.embedding(input_ids), None
        for block in self.layers:
            hidden, second = block(hidden, second)
        final: torch.Tensor = hidden + second if self.is_split else hidden
        return final


@pytest.fixture
def config(tiny_llama: str) -> VllmConfig:
    return EngineArgs(model=tiny_llama, dtype="float32", enforce_eager=True, **SETTINGS).create_engine_config()


def probe(
    config: VllmConfig,
    form: type[Any],
    wanted: tuple[Site, ...] = SITES_IN_BLOCKS,
    dtype: torch.dtype = torch.float32,
) -> dict[int, SiteModule]:
    model = Model(form, config.model_config.get_hidden_size()).to(dtype)
    context = config.compilation_config.static_forward_context
    context.update({name: module for name, module in model.named_modules() if isinstance(module, RawAttention)})
    forms = dict.fromkeys(range(NUM_BLOCKS), form.form)
    return find_site_modules(model, model.layers, forms, wanted, config, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [Llama, Tuples, NeoX, Granite, AddsInPlace])
def test_the_modules_are_the_sites(config: VllmConfig, form: type[Any], dtype: torch.dtype) -> None:
    found = probe(config, form, dtype=dtype)
    assert [(point, each.name) for point, each in found.items()] == [
        *((point, "self_attn") for point in ATTN),
        *((point, "mlp") for point in MLP),
    ]
    assert not any(each.copies for each in found.values())
    assert all(each.num_calls == 1 and each.output is None for each in found.values())


def test_a_norm_of_the_output_is_the_site(config: VllmConfig) -> None:
    found = probe(config, Gemma)
    assert found[ATTN[1]].name == "self_attn and post_attention_norm"
    assert found[MLP[1]].name == "mlp and post_feed_norm"
    assert {type(each.module) for each in found.values()} == {nn.RMSNorm}
    assert len({id(each.module) for each in found.values()}) == 2 * NUM_BLOCKS


def test_an_output_over_its_input_is_edited_in_a_copy(config: VllmConfig) -> None:
    found = probe(config, OverItsInput)
    assert [found[point].copies for point in (*ATTN, *MLP)] == [False] * NUM_BLOCKS + [True] * NUM_BLOCKS


def test_one_site_may_be_armed_alone(config: VllmConfig) -> None:
    assert tuple(probe(config, TwoMlps, (Site.ATTN,))) == ATTN
    assert probe(config, Mamba, ()) == {}


REFUSED = [
    (
        Bounded,
        Site.MLP,
        r"block 0 \(Bounded\): the output of mlp is not added to the residual stream in proportion to its size, as",
    ),
    (
        Mamba,
        Site.ATTN,
        r"^Site 'attn' does not exist in every armed block: blocks 0-2 \(Mamba\) have no attention in a",
    ),
    (Mamba, Site.MLP, r"^Site 'mlp' does not exist in every armed block: blocks 0-2 \(Mamba\) have no MLP in a module"),
    (TwoMlps, Site.MLP, r"^Site 'mlp' cannot be armed in block 0 \(TwoMlps\): .* several parts: mlp, shared_mlp\."),
    (
        Projected,
        Site.ATTN,
        r"block 0 \(Projected\): the output of self_attn is not added to the residual stream as it is",
    ),
    (Projected, Site.MLP, r"block 0 \(Projected\): the output of mlp is not added to the residual stream as it is"),
    (Skips, Site.MLP, r"block 0 \(Skips\): its mlp runs 0 times in one forward pass"),
    (
        TooNarrow,
        Site.ATTN,
        r"block 0 \(TooNarrow\): its self_attn returns a tensor of shape \[\d+, 8\], not a row of 64",
    ),
    (Silent, Site.ATTN, r"block 0 \(Silent\): its self_attn returns no tensor, not a row of 64 for each token"),
]


@pytest.mark.parametrize(("form", "site", "message"), REFUSED)
def test_a_model_without_the_site_is_refused_by_name(
    config: VllmConfig, form: type[Any], site: Site, message: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=message) as caught:
        probe(config, form, (site,))
    assert caught.value.message.endswith("Leave it out of --steering-sites, or these blocks out of --steering-blocks.")
    assert "\n" not in caught.value.message


def test_a_share_of_a_rank_is_refused(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with different halves of a sum, as Falcon has; with whole outputs, both have the same."""
    config.parallel_config.tensor_parallel_size = 2
    monkeypatch.setattr(sites, "tensor_model_parallel_all_reduce", lambda rows: 2 * rows)
    assert len(probe(config, NeoX)) == 2 * NUM_BLOCKS
    monkeypatch.setattr(sites, "tensor_model_parallel_all_reduce", lambda rows: rows + torch.ones_like(rows))
    with pytest.raises(UnsupportedEngineError, match="self_attn is summed over the ranks of tensor parallelism only"):
        probe(config, NeoX)


def test_experts_that_are_summed_later_are_refused(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all ranks return the same, as with the made-up attention of the probe."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    assert "skip_final_all_reduce" in FusedMoEConfig.__dataclass_fields__
    assert len(probe(config, Deferred)) == 2 * NUM_BLOCKS, "one rank has nothing to sum"
    config.parallel_config.tensor_parallel_size = 2
    monkeypatch.setattr(sites, "tensor_model_parallel_all_reduce", lambda rows: 2 * rows)
    with pytest.raises(UnsupportedEngineError, match="the experts of mlp are summed over the ranks"):
        probe(config, Deferred)
    assert len(probe(config, Deferred, (Site.ATTN,))) == NUM_BLOCKS


class Doubling:
    """In place of a runtime: doubles what it is given, and notes where."""

    def __init__(self) -> None:
        self.sites: list[int] = []

    def edit(self, hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
        assert hidden is None
        carried *= 2
        self.sites.append(site)


@pytest.mark.parametrize("module", [Feed(8), Tuple(8), InPlace(8)], ids=["tensor", "tuple", "in place"])
def test_an_armed_module_returns_its_output_edited(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    runtime = Doubling()
    monkeypatch.setattr(op, "_running", lambda: runtime)
    if isinstance(module, Tuple):
        module.attn.forward = lambda query, key, value: query
    given = torch.randn(3, 8)
    with torch.inference_mode():
        plain = module(given.clone())
        copies = isinstance(module, InPlace)
        module.forward = _edited_part(SiteModule(module, "mlp", copies), 5)
        rows = given.clone()
        output = module(rows)
    first, second = (each[0] if isinstance(each, tuple) else each for each in (plain, output))
    assert torch.equal(second, 2 * first)
    assert runtime.sites == [5]
    if copies:
        assert torch.equal(rows, first), "what others may read is not edited"
