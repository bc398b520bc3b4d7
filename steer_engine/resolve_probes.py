"""Resolving probes and stop rules, checked against the model and the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from steer_engine.errors import SteeringRequestError
from steer_engine.fields import parse_blocks, shown
from steer_engine.probe import Platt, Probe, ProbePlan, StopRule, bounds_on_dot
from steer_engine.probe_spec import ProbeSpec, StopSpec
from steer_engine.resolve_when import CheckBlocks, SiteFor, resolve_scope
from steer_engine.settings import Limits
from steer_engine.site import Site, points_at
from steer_engine.vectors import ControlVector
from steer_engine.vocabulary import Vocabulary

PARAM = "steering.probes"

Lookup = Callable[[str, str], ControlVector]
"""(name, path of the probe) -> a vector that can be measured on this engine."""


def resolve_probes(
    requested: Sequence[ProbeSpec],
    lookup: Lookup,
    site_for: SiteFor,
    check_blocks: CheckBlocks,
    limits: Limits,
    vocabulary: Vocabulary,
    known: Sequence[Probe] = (),
) -> tuple[Probe, ...]:
    """known: probes of the request's preset, which come first.

    Raises:
        SteeringRequestError: a probe cannot be measured, a name is used twice, or there are too many.
    """
    if len(known) + len(requested) > limits.max_probes:
        raise SteeringRequestError(
            f"The request has {len(known) + len(requested)} probes; at most {limits.max_probes} are allowed "
            "(max_probes).",
            PARAM,
        )
    probes = list(known)
    for number, probe in enumerate(requested):
        param = f"{PARAM}[{number}]"
        if any(probe.name == other.name for other in probes):
            raise SteeringRequestError(f"The probe name {shown(probe.name)} is used twice.", f"{param}.name")
        probes.append(_resolve_probe(probe, param, lookup, site_for, check_blocks, limits, vocabulary))
    count = sum(len(probe.blocks) for probe in probes)
    if count > limits.max_probe_numbers:
        raise SteeringRequestError(
            f"The probes give {count} numbers per token; at most {limits.max_probe_numbers} are allowed "
            "(max_probe_numbers). Measure at fewer blocks.",
            PARAM,
        )
    return tuple(probes)


def _resolve_probe(
    requested: ProbeSpec,
    param: str,
    lookup: Lookup,
    site_for: SiteFor,
    check_blocks: CheckBlocks,
    limits: Limits,
    vocabulary: Vocabulary,
) -> Probe:
    assert isinstance(requested.vector, str), "inline vectors are registered and named by digest before"
    vector = lookup(requested.vector, param)
    site = site_for(requested.site, vector, f"{param}.site")
    blocks = parse_blocks(requested.blocks) or vector.blocks
    check_blocks(vector, blocks, f"{param}.vector" if requested.blocks == "all" else f"{param}.blocks")
    scope = resolve_scope(requested.scope, f"{param}.scope", vocabulary, limits)
    if scope.is_empty:
        raise SteeringRequestError("The scope of the probe has no positions, whatever the prompt.", f"{param}.scope")
    return Probe(
        name=requested.name,
        vector=vector.digest,
        blocks=blocks,
        measure="cosine" if requested.measure == "cosine" else "dot",
        scope=scope,
        after=requested.after,
        returns=requested.return_,
        platt=_calibration(requested, vector, blocks, site, f"{param}.measure"),
        site=site,
    )


def _calibration(
    requested: ProbeSpec, vector: ControlVector, blocks: tuple[int, ...], site: Site, param: str
) -> tuple[Platt, ...]:
    """Of each block, for measure 'probability'; none for the others."""
    if requested.measure != "probability":
        return ()
    if site is not vector.metadata.site:
        raise SteeringRequestError(
            f"The probe was calibrated at site {vector.metadata.site.value!r}, not at {site.value!r}; use measure "
            "'dot'.",
            param,
        )
    fitted = vector.metadata.probe
    known = {} if fitted is None else {block: each.platt for block, each in fitted.blocks.items() if each.platt}
    if missing := [block for block in blocks if block not in known]:
        raise SteeringRequestError(
            f"The vector's file has no calibration for block {missing[0]}: measure 'probability' needs a probe that "
            "was fitted there ('steer-engine probe fit').",
            param,
        )
    return tuple(known[block] for block in blocks)


def check_prompt_numbers(plan: ProbePlan, prompt_len: int, limits: Limits) -> None:
    """Raise SteeringRequestError if the probes would give too many numbers for the tokens of a prompt."""
    count = prompt_len * plan.num_columns if plan.start < prompt_len - 1 else 0
    if count > limits.max_prompt_numbers:
        raise SteeringRequestError(
            f"The probes would give {count} numbers for the {prompt_len} tokens of the prompt; at most "
            f"{limits.max_prompt_numbers} are allowed (max_prompt_numbers). Measure fewer blocks, or the answer only.",
            PARAM,
        )


def resolve_stops(requested: Sequence[StopSpec], probes: Sequence[Probe]) -> tuple[StopRule, ...]:
    """Raises SteeringRequestError if a rule names no probe, or one without a number for generated tokens."""
    return tuple(_resolve_stop(stop, f"steering.stop[{number}]", probes) for number, stop in enumerate(requested))


def _resolve_stop(requested: StopSpec, param: str, probes: Sequence[Probe]) -> StopRule:
    found = [number for number, probe in enumerate(probes) if probe.name == requested.probe]
    if not found:
        names = ", ".join(probe.name for probe in probes) or "none"
        raise SteeringRequestError(
            f"There is no probe {shown(requested.probe)}; the request's probes: {names}.", f"{param}.probe"
        )
    probe = probes[found[0]]
    if requested.block is None and len(probe.blocks) > 1:
        raise SteeringRequestError(
            f"The probe {shown(probe.name)} measures at {len(probe.blocks)} blocks: say which one in 'block'.",
            f"{param}.block",
        )
    block = probe.blocks[0] if requested.block is None else requested.block
    if block not in probe.blocks:
        raise SteeringRequestError(
            f"The probe {shown(probe.name)} does not measure at block {block}.", f"{param}.block"
        )
    if not probe.scope.may_cover_answer:
        raise SteeringRequestError(
            f"The scope of the probe {shown(probe.name)} has no generated tokens, so the rule could never apply.",
            f"{param}.probe",
        )
    (point,) = points_at([block], probe.site)
    column = ProbePlan(tuple(each.points for each in probes), 0).columns(found[0])[point]
    low, high = _bounds(requested, probe, block, param)
    return StopRule(probe.name, column, low, high, requested.for_)


def _bounds(requested: StopSpec, probe: Probe, block: int, param: str) -> tuple[float, float]:
    """The open interval in which the engine's number must be."""
    above, below = requested.above, requested.below
    if not probe.platt:
        return -inf if above is None else above, inf if below is None else below
    for name, bound in (("above", above), ("below", below)):
        if bound is not None and not 0 < bound < 1:
            raise SteeringRequestError(f"{name} {bound:g} is not a probability between 0 and 1.", f"{param}.{name}")
    platt = probe.platt[probe.blocks.index(block)]
    if platt.a == 0:
        raise SteeringRequestError(
            f"The calibration of the probe {shown(probe.name)} gives the same probability to every token.",
            f"{param}.probe",
        )
    return bounds_on_dot(platt, above, below)
