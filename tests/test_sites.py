"""Edits at the outputs of attention and MLP: what is refused, what differs from an edit of the stream, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_specs import BY_DIGEST, HIDDEN_SIZE, MODEL, NUM_BLOCKS, VECTORS, resolved
from helpers.stepping import changed, edited, new_runtime, program, route, stream

from steer_engine.api.monitors import resolve_monitors
from steer_engine.containment import ASSUMED_PEAK
from steer_engine.errors import SteeringRequestError, UnsupportedEngineError
from steer_engine.fields import MAX_BLOCK_NUMBER
from steer_engine.model_shape import ModelShape
from steer_engine.monitor import Watched, monitors_of_environment
from steer_engine.program import Program, block_key
from steer_engine.settings import Limits, SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS, Site, all_points, block_of, describe_point, points_at, site_of

ARMED = ModelShape(**{name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__} | {"sites": SITES_IN_BLOCKS})
A, B = VECTORS["a"].digest, VECTORS["b"].digest


def resolved_at(*edits: dict[str, Any], model: ModelShape = ARMED, **rest: Any) -> Any:
    return resolved({"edits": [{"vector": "a", **edit} for edit in edits], **rest}, model)


def refusal(*edits: dict[str, Any], model: ModelShape = ARMED, **rest: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        resolved_at(*edits, model=model, **rest)
    return caught.value


@pytest.mark.parametrize("site", Site)
def test_a_point_is_a_block_at_a_site(site: Site) -> None:
    blocks = (0, 3, MAX_BLOCK_NUMBER)
    points = points_at(blocks, site)
    assert [(block_of(point), site_of(point)) for point in points] == [(block, site) for block in blocks]
    assert describe_point(points[1]) == ("3" if site is Site.BLOCK else f"3 ({site.value})")


def test_points_of_outputs_are_block_numbers_and_come_first() -> None:
    points = all_points((1, 4), (Site.MLP, Site.ATTN))
    assert points == (1, 4, *points_at((1, 4), Site.ATTN), *points_at((1, 4), Site.MLP))
    assert sorted(set(points)) == list(points)
    assert all_points((1, 4), ()) == (1, 4)


# What a request may ask for


def test_a_site_that_is_not_armed_is_refused() -> None:
    error = refusal({}, {"site": "mlp"}, model=MODEL)
    assert error.param == "steering.edits[1].site"
    assert error.message == "Site 'mlp' is not armed here; armed: block (--steering-sites)."
    only_mlp = ModelShape(**{**vars_of(ARMED), "sites": (Site.MLP,)})
    assert "armed: block, mlp (--steering-sites)" in refusal({"site": "attn"}, model=only_mlp).message
    assert resolved_at({"site": "mlp"}, model=only_mlp).edits[0].edit.site is Site.MLP


def vars_of(model: ModelShape) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}


@pytest.mark.parametrize("site", ["blocks", "residual", 1, ["mlp"]])
def test_an_unknown_site_is_refused_with_the_valid_ones(site: Any) -> None:
    error = refusal({"site": site})
    assert error.param == "steering.edits[0].site"
    assert all(name in error.message for name in ("block", "attn", "mlp"))


def test_the_default_is_the_output_of_the_block() -> None:
    """Named or not: equal digests, and those of a server without the flag."""
    plain = resolved_at({}, model=MODEL)
    for spec in (resolved_at({}), resolved_at({"site": "block"}), resolved_at({"site": None}, model=MODEL)):
        assert spec.digest == plain.digest
        assert spec.edits[0].edit.digest == plain.edits[0].edit.digest
        assert spec.template.at(9).to_wire() == plain.template.at(9).to_wire()
        assert spec.report() == plain.report()
    assert "site" not in plain.report()["edits"][0]


def test_the_report_names_the_site_and_the_blocks() -> None:
    (entry,) = resolved_at({"site": "attn", "blocks": [1, 2]}).report()["edits"]
    assert entry["site"] == "attn"
    assert entry["blocks"] == [1, 2]


@pytest.mark.parametrize("edit", [{}, {"op": "ablate"}, {"schedule": {"kind": "linear", "over": 8, "to": 0.5}}])
def test_each_site_has_its_own_identity(edit: dict[str, Any]) -> None:
    specs = [resolved_at(edit | {"site": site.value}) for site in Site]
    assert len({spec.digest for spec in specs}) == 3
    keys = {block_key(spec.template.at(40).to_wire(), (), 0, 16) for spec in specs}
    assert len(keys) == 3
    assert None not in keys


def test_adds_are_summed_at_one_site_only() -> None:
    spec = resolved_at({"scale": 1.0}, {"scale": 2.0, "site": "mlp"}, {"scale": 0.5, "site": "mlp"}, {"scale": 0.25})
    assert {(edit.site, edit.scales[0]) for edit in spec.template.edits} == {(Site.BLOCK, 1.25), (Site.MLP, 2.5)}
    swapped = resolved_at({"scale": 2.5, "site": "mlp"}, {"scale": 1.25})
    assert swapped.digest == spec.digest
    cancelled = resolved_at({"scale": 1.0, "site": "mlp"}, {"scale": -1.0, "site": "attn"})
    assert len(cancelled.template.edits) == 2, "different places do not cancel"


def test_rows_are_counted_at_each_site() -> None:
    model = ModelShape(**{**vars_of(ARMED), "rows": 1})
    edits = [{"site": site.value, "op": "ablate"} for site in Site]
    assert resolved_at(*edits, model=model).template.rows == 1
    assert "need 2 rows at one block" in refusal(*edits, edits[1], model=model).message


def test_a_condition_is_decided_before_the_sites_of_later_blocks() -> None:
    """Measured at the output of block 1: block 1 has been computed then, and block 2 has not."""
    when = {"vector": "b", "blocks": 1, "above": 0.0}
    spec = resolved_at({"site": "attn", "blocks": [1, 2], "when": when})
    starts = {
        point: entry.start
        for group in spec.template.at(10).sites
        for point in group.blocks
        for entry in group.entries
        if entry.c0
    }
    early, late = points_at((1, 2), Site.ATTN)
    assert starts == {early: 10, late: 9}


def test_a_probe_at_a_site_has_columns_of_its_own() -> None:
    probe = {"name": "p", "vector": "a", "blocks": [1, 3], "measure": "dot", "scope": "all"}
    probes = [probe | {"name": site.value, "site": site.value} for site in Site]
    spec = resolved({"probes": probes, "stop": [{"probe": "mlp", "block": 3, "above": 0.0}]}, ARMED)
    assert [entry.get("site") for entry in spec.report()["probes"]] == [None, "attn", "mlp"]
    assert spec.template.stops[0].column == 5
    runtime = new_runtime(sites=SITES_IN_BLOCKS)
    runtime.admit(1, Program.from_wire(spec.template.at(4).to_wire()))
    route(runtime, (1, 0, 4))
    for number in range(len(runtime.points)):
        runtime.edit(None, stream(seed=number)[1][:4], number)
    told_NK = runtime.probed(torch.arange(4), 6)
    for column, point in enumerate(point for site in Site for point in points_at((1, 3), site)):
        rows_ND = stream(seed=runtime.points.index(point))[1][:4]
        v_D = torch.tensor(VECTORS["a"].directions[block_of(point)])
        assert torch.allclose(told_NK[:, column], rows_ND @ v_D, atol=1e-4)


def test_a_probe_at_a_site_that_is_not_armed_is_refused() -> None:
    probe = {"name": "p", "vector": "a", "blocks": 1, "site": "attn"}
    with pytest.raises(SteeringRequestError) as caught:
        resolved({"probes": [probe]}, MODEL)
    assert caught.value.param == "steering.probes[0].site"
    assert "not armed here" in caught.value.message
    with pytest.raises(SteeringRequestError, match="calibrated at site 'block', not at 'attn'") as caught:
        resolved({"probes": [probe | {"measure": "probability"}]}, ARMED)
    assert caught.value.param == "steering.probes[0].measure"


def test_a_capture_names_its_site() -> None:
    capturing = ModelShape(**{**vars_of(ARMED), "capture_blocks": (1, 2)})
    found = resolved({"capture": {"site": "mlp"}}, capturing)
    assert found.capture.points == points_at((1, 2), Site.MLP)
    assert found.report()["capture"] == {
        "blocks": [1, 2], "positions": "last", "scope": "prompt", "after": False, "site": "mlp"
    }  # fmt: skip
    for spec in ({"capture": {}}, {"capture": {"site": "block"}}):
        assert resolved(spec, capturing).capture.points == (1, 2)
        assert "site" not in resolved(spec, capturing).report()["capture"]
    unarmed = ModelShape(**{**vars_of(capturing), "sites": (Site.ATTN,)})
    with pytest.raises(SteeringRequestError) as caught:
        resolved({"capture": {"site": "mlp"}}, unarmed)
    assert caught.value.param == "steering.capture.site"
    assert caught.value.message == "Site 'mlp' is not armed here; armed: block, attn (--steering-sites)."


WHEN = {"vector": "b", "blocks": 1, "above": 0.0}


def test_a_condition_is_measured_at_its_site() -> None:
    specs = [resolved_at({}, when=WHEN | {"site": site}) for site in (None, "block", "attn", "mlp")]
    assert [entry.get("site") for spec in specs for entry in spec.report()["conditions"]] == [None, None, "attn", "mlp"]
    assert specs[0].digest == specs[1].digest == resolved_at({}, when=WHEN, model=MODEL).digest
    assert len({spec.digest for spec in specs}) == 3
    for spec, site in zip(specs[1:], Site, strict=True):
        (condition,) = spec.template.conditions
        assert condition.points == points_at((1,), site)
        assert measured_at(spec.template.at(10)) == {*condition.points}


def measured_at(program: Program) -> set[int]:
    entries = [(point, entry) for group in program.sites for point in group.blocks for entry in group.entries]
    return {point for point, entry in entries if entry.details is not None and entry.details.measure}


def test_a_condition_on_an_output_decides_on_the_device() -> None:
    """The number is that of the rows of the MLP's output, and the edit follows in the blocks after it."""
    numbers = {"attn": 5.0, "mlp": -3.0, "block": -7.0}
    for site, number in numbers.items():
        when = {"vector": "b", "blocks": 1, "measure": "dot", "above": 0.0, "site": site}
        runtime = new_runtime(sites=SITES_IN_BLOCKS)
        runtime.admit(1, armed_program({"blocks": [1, 2], "scale": 2.0}, when=when))
        route(runtime, (1, 0, 4))
        direction = torch.tensor(VECTORS["b"].directions[1])
        changed_at = []
        for block in range(NUM_BLOCKS):
            for each in ("attn", "mlp", "block"):
                (point,) = points_at((block,), Site(each))
                x_TD = torch.zeros(4, HIDDEN_SIZE)
                x_TD[-1] = numbers[each] * direction / direction.square().sum()
                if changed(x_TD, edited(runtime, None, x_TD, runtime.points.index(point))):
                    changed_at.append(point)
        told = float(runtime.measured([1])[0, 0])
        assert told == pytest.approx(number, rel=1e-5)
        assert changed_at == ([2] if number > 0 else []), "the output of block 1 may be computed before the decision"


def test_a_condition_at_a_site_that_is_not_armed_is_refused() -> None:
    error = refusal({}, when=WHEN | {"site": "mlp"}, model=MODEL)
    assert (error.param, "not armed here" in error.message) == ("steering.when.site", True)


# Vectors that were derived at a site


@pytest.fixture
def of_mlp() -> str:
    """The digest of vector `a` as if it had been derived at the MLPs."""
    vector = VECTORS["a"].with_metadata(site="mlp")
    BY_DIGEST[vector.digest] = vector
    return vector.digest


def test_a_vector_applies_where_it_was_derived(of_mlp: str) -> None:
    assert of_mlp != A
    for requested, expected in ((None, Site.MLP), ("mlp", Site.MLP), ("attn", Site.ATTN), ("block", Site.BLOCK)):
        probe = {"name": "p", "vector": of_mlp, "site": requested, "blocks": 0}
        spec = resolved_at(
            {"vector": of_mlp, "site": requested, "when": WHEN | {"blocks": 2, "vector": of_mlp, "site": requested}},
            probes=[probe],
        )
        assert spec.edits[0].edit.site is expected
        assert spec.template.conditions[0].site is expected
        assert spec.template.probes[0].site is expected
        assert spec.edits[0].edit.points == points_at(range(NUM_BLOCKS), expected)


def test_a_vector_of_a_site_that_is_not_armed_names_the_flag(of_mlp: str) -> None:
    error = refusal({"vector": of_mlp}, model=MODEL)
    assert error.param == "steering.edits[0].site"
    assert error.message == (
        "The vector was derived at site 'mlp', which is not armed here; armed: block (--steering-sites). Arm it, or "
        "name one of these to use it there."
    )
    assert resolved_at({"vector": of_mlp, "site": "block"}, model=MODEL).edits[0].edit.site is Site.BLOCK


def test_a_monitor_measures_at_the_site_of_its_vector(of_mlp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_ENGINE_MONITORS", f"x={of_mlp}:1:dot")
    specs = monitors_of_environment()
    monitors, used = resolve_monitors(specs, BY_DIGEST.__getitem__, ARMED, Limits())
    assert str(monitors[0]).startswith("x: dot at block 1 (mlp)")
    assert used.keys() == {of_mlp}
    with pytest.raises(UnsupportedEngineError, match="--steering-monitor .* derived at site 'mlp', which is not armed"):
        resolve_monitors(specs, BY_DIGEST.__getitem__, MODEL, Limits())
    runtime = new_runtime(sites=SITES_IN_BLOCKS)
    watched = Watched.from_wire(Watched.of(monitors).to_wire())
    runtime.watch(watched)
    runtime.admit(1, watched.added_to(None, 4))
    route(runtime, (1, 0, 4))
    rows = {}
    for number, point in enumerate(runtime.points):
        rows[point] = stream(seed=number)[1][:4]
        runtime.edit(None, rows[point].clone(), number)
    told = float(runtime.probed(torch.tensor([3]), 1)[0, 0])
    direction = torch.tensor(VECTORS["a"].directions[1])
    assert told == pytest.approx(float(rows[points_at((1,), Site.MLP)[0]][3] @ direction), abs=1e-4)


def test_a_calibration_is_of_the_vectors_site(of_mlp: str) -> None:
    probe = {"name": "p", "vector": of_mlp, "blocks": 1, "measure": "probability"}
    with pytest.raises(SteeringRequestError, match="has no calibration for block 1"):
        resolved({"probes": [probe]}, ARMED)
    with pytest.raises(SteeringRequestError, match="calibrated at site 'mlp', not at 'block'; use measure 'dot'"):
        resolved({"probes": [probe | {"site": "block"}]}, ARMED)


# What can overflow


def in_float16(*edits: dict[str, Any], **rest: Any) -> Any:
    return resolved_at(*edits, model=ModelShape(**{**vars_of(ARMED), "dtype": "float16"}), **rest)


def bound_of(*edits: dict[str, Any], **rest: Any) -> float:
    """The norm that a refusal names."""
    with pytest.raises(SteeringRequestError, match="could grow the residual stream") as caught:
        in_float16(*edits, **rest)
    return float(caught.value.message.partition("norm of ")[2].partition(";")[0])


def test_what_could_overflow_at_a_site_is_refused() -> None:
    """In float16 the largest row of the stream, and of an output, is taken to be half of what the dtype holds."""
    peak = ASSUMED_PEAK["float16"]
    tenfold = {"op": "add_relative", "scale": 9.0, "site": "mlp"}
    assert resolved_at(tenfold, tenfold).edits
    # From the size of a row to a hundred times that, at four blocks, beside the stream itself.
    assert bound_of(tenfold, tenfold) == pytest.approx(peak + 4 * 99 * peak, rel=0.05)
    assert in_float16({"scale": 9.0, "site": "attn"}).edits
    # A removed component may have been all that held a larger one in the stream down.
    removing = [{"op": "ablate", "scale": 9.5, "site": site} for site in ("attn", "mlp")]
    assert bound_of(*removing) == pytest.approx(peak + 8 * 9.5 * peak, rel=0.05)
    # A kept norm bounds what reaches the stream, and not what is computed on the way.
    assert bound_of(*[tenfold] * 3, preserve_norm=True) == pytest.approx(1000 * peak, rel=0.05)


# Where it ends up


def test_the_config_orders_sites_and_drops_the_default() -> None:
    assert SteeringConfig(sites=("mlp", "attn", "mlp")).sites == (Site.ATTN, Site.MLP)  # type: ignore[arg-type]
    assert SteeringConfig(sites=("block",)).sites == ()  # type: ignore[arg-type]
    with pytest.raises(UnsupportedEngineError, match=r"sites\.0: .*'block', 'attn' or 'mlp'"):
        SteeringConfig.from_additional_config({"steer_engine": {"sites": ["ffn"]}})
    config = SteeringConfig(blocks="1-2", sites=(Site.MLP,))
    assert config.armed_points(4) == all_points((1, 2), (Site.MLP,))
    through = SteeringConfig.from_additional_config(config.to_additional_config())
    assert through == config


def armed_program(*edits: dict[str, Any], **rest: Any) -> Program:
    at: Program = resolved_at(*edits, **rest).template.at(4)
    return Program.from_wire(at.to_wire())


def test_a_site_has_rows_of_the_tables_of_its_own() -> None:
    runtime = new_runtime(sites=SITES_IN_BLOCKS)
    assert runtime.armed_blocks == tuple(range(NUM_BLOCKS))
    assert runtime.tables.counts_SL.shape[1] == 3 * NUM_BLOCKS
    runtime.admit(1, armed_program({"site": "mlp", "blocks": 2, "scale": 3.0}))
    _, output = stream()
    route(runtime, (1, 0, 2), (0, 0, 2))
    place = runtime.points.index(points_at((2,), Site.MLP)[0])
    for site in range(3 * NUM_BLOCKS):
        after = edited(runtime, None, output, site)
        assert changed(output, after) == ([0, 1] if site == place else [])
        if site == place:
            expected = output[:2] + 3.0 * torch.tensor(VECTORS["a"].directions[2])
            assert torch.allclose(after[:2], expected, atol=1e-5)


@pytest.mark.parametrize("edit", [{"op": "ablate"}, {"op": "clamp", "hi": 0.0}, {"op": "add_relative", "scale": 0.5}])
def test_an_operation_reads_the_output_that_it_edits(edit: dict[str, Any]) -> None:
    """The same numbers as at the output of the block, for equal input."""
    runtime = new_runtime(sites=SITES_IN_BLOCKS)
    runtime.admit(1, armed_program(edit | {"site": "attn", "blocks": 3}))
    runtime.admit(2, program(edit | {"blocks": 3}))
    _, output = stream()
    output[2:4] = output[:2]
    route(runtime, (1, 0, 2), (2, 0, 2))
    at_site = edited(runtime, None, output, runtime.points.index(points_at((3,), Site.ATTN)[0]))
    at_block = edited(runtime, None, output, 3)
    assert torch.equal(at_site[:2], at_block[2:4])
    assert changed(output, at_site) == [0, 1]
    assert changed(output, at_block) == [2, 3]


def test_without_sites_the_tables_are_as_before() -> None:
    plain, armed = new_runtime(), new_runtime(sites=(Site.ATTN,))
    assert plain.points == plain.armed_blocks
    assert plain.tables.counts_SL.shape[1] == NUM_BLOCKS
    assert armed.tables.bank_RD.shape[0] - plain.tables.bank_RD.shape[0] == 3 * NUM_BLOCKS * 8
    assert plain.tables.bank_RD.shape[1] == HIDDEN_SIZE
    assert np.isfinite(plain.num_bytes)
