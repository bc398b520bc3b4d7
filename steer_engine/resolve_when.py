"""Resolving when an edit applies: scopes, schedules and conditions, checked against the model and the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steer_engine.edit import ALL, GENERATION, LAST_PROMPT_TOKEN, PROMPT, Bound, Condition, Edit, Schedule, Scope, When
from steer_engine.errors import SteeringRequestError
from steer_engine.fields import parse_blocks
from steer_engine.probe import Probe
from steer_engine.scope import AnySpec, ConditionSpec, ScheduleSpec, ScopeSpec, TriggerSpec, WhenField, conditions_of
from steer_engine.settings import Limits
from steer_engine.site import Site
from steer_engine.trigger import NO_END, Trigger
from steer_engine.vectors import ControlVector
from steer_engine.vocabulary import Vocabulary

WORDS = {"all": ALL, "prompt": PROMPT, "generation": GENERATION, "last_prompt_token": LAST_PROMPT_TOKEN}

Lookup = Callable[[str, str], ControlVector]
"""(name, path of the condition) -> a vector that can be measured on this engine."""
SiteFor = Callable[[Site | None, ControlVector, str], Site]
"""(requested site, vector, param) -> the site to measure at. Raises SteeringRequestError where it is not armed."""
CheckBlocks = Callable[[ControlVector, tuple[int, ...], str], None]
"""(vector, blocks, param): raises SteeringRequestError where it cannot be measured at the blocks."""


def resolve_scope(scope: str | ScopeSpec, param: str, vocabulary: Vocabulary, limits: Limits) -> Scope:
    """The positions of an edit.

    Raises:
        SteeringRequestError: a trigger is unknown or too long, or the scope contradicts itself.
    """
    if isinstance(scope, str):
        return WORDS[scope] if scope in WORDS else ALL._replace(trigger=_word(scope, param, vocabulary, limits))
    trigger = _trigger(scope, param, vocabulary, limits) if scope.is_trigger else None
    exclude = None
    if isinstance(scope.except_, str):
        exclude = _word(scope.except_, f"{param}.except", vocabulary, limits)
    elif scope.except_ is not None:
        exclude = _trigger(scope.except_, f"{param}.except", vocabulary, limits)
    if trigger is not None and trigger == exclude:
        raise SteeringRequestError("The scope contradicts itself: 'except' is the whole scope.", f"{param}.except")
    return _span(scope)._replace(trigger=trigger, exclude=exclude)


def _span(scope: ScopeSpec) -> Scope:
    if scope.from_ is None:
        return Scope.span(scope.start, scope.end)
    # Position P-1 selects generated token 0.
    end = Bound(False, NO_END) if scope.end is None else Bound(True, scope.end - 1)
    return Scope(Bound(True, (scope.start or 0) - 1), end)


def _word(word: str, param: str, vocabulary: Vocabulary, limits: Limits) -> Trigger:
    trigger = vocabulary.trigger(word, param)
    for ids in (trigger.after, trigger.until):
        _check_length(f"A tag of {word!r}", ids, param, limits)
    return trigger


def _check_length(what: str, ids: tuple[int, ...], param: str, limits: Limits) -> None:
    if len(ids) > limits.max_trigger_tokens:
        raise SteeringRequestError(
            f"{what} has {len(ids)} tokens; at most {limits.max_trigger_tokens} are allowed (max_trigger_tokens).",
            param,
        )


def _trigger(trigger: TriggerSpec, param: str, vocabulary: Vocabulary, limits: Limits) -> Trigger:
    sides = []
    for name, tokens in (("after", trigger.after), ("until", trigger.until)):
        ids = () if tokens is None else vocabulary.sequence(tokens, f"{param}.{name}")
        _check_length(name, ids, f"{param}.{name}", limits)
        sides.append(ids)
    after, until = sides
    if after == until:
        raise SteeringRequestError("after and until are the same tokens.", f"{param}.until")
    tokens = NO_END if trigger.tokens is None else trigger.tokens
    return Trigger(after, until, trigger.each, tokens)


def resolve_schedule(schedule: ScheduleSpec | None) -> Schedule | None:
    if schedule is None or schedule.to == 1.0:
        return None
    return Schedule(schedule.kind == "exponential", schedule.over, schedule.to)


def resolve_when(
    when: WhenField | None,
    param: str,
    last_block: int,
    lookup: Lookup,
    site_for: SiteFor,
    check_blocks: CheckBlocks,
) -> When | None:
    """The conditions of an edit whose last block is `last_block`.

    Raises:
        SteeringRequestError: a condition cannot be measured, or is decided too late for the edit.
    """
    if when is None:
        return None
    found = []
    for path, condition in conditions_of(when):
        resolved = _condition(condition, f"{param}{path}", lookup, site_for, check_blocks)
        if resolved.blocks[-1] >= last_block:
            raise SteeringRequestError(
                f"The condition is decided at block {resolved.blocks[-1]}, and the edit's last block is {last_block}: "
                "no later block is left. Measure at an earlier block, or edit later ones.",
                f"{param}{path}.blocks",
            )
        found.append(resolved)
    # Each once and in a fixed order, so that equal meaning has an equal digest.
    unique = tuple(sorted(set(found), key=repr))
    return When(unique, any=isinstance(when, AnySpec) and len(unique) > 1)


def _condition(
    requested: ConditionSpec, param: str, lookup: Lookup, site_for: SiteFor, check_blocks: CheckBlocks
) -> Condition:
    assert isinstance(requested.vector, str), "inline vectors are registered and named by digest before"
    vector = lookup(requested.vector, param)
    site = site_for(requested.site, vector, f"{param}.site")
    if requested.is_bounded:
        found = Condition(
            vector=vector.digest,
            blocks=(None if requested.blocks is None else parse_blocks(requested.blocks)) or vector.blocks,
            measure=requested.measure or "cosine",
            at=requested.at or "last_prompt_token",
            above=requested.above,
            below=requested.below,
            site=site,
        )
    else:
        found = _fitted(requested, vector, param)
    check_blocks(vector, found.blocks, f"{param}.vector" if requested.blocks is None else f"{param}.blocks")
    return found


def _fitted(requested: ConditionSpec, vector: ControlVector, param: str) -> Condition:
    """The condition in the vector's file, for a request that names the vector only."""
    fitted = vector.metadata.condition
    given = [name for name in ("blocks", "site", "measure", "at") if getattr(requested, name) is not None]
    if fitted is None or given:
        reason = f"it has its own {given[0]}" if given else "the vector's file has no condition"
        raise SteeringRequestError(
            f"The condition needs 'above' or 'below': {reason} ('steer-engine condition fit' stores one).",
            f"{param}.above",
        )
    return Condition(
        vector.digest, fitted.blocks, fitted.measure, fitted.at, fitted.above, fitted.below, vector.metadata.site
    )


def check_counts(edits: Sequence[Edit], probes: Sequence[Probe], limits: Limits) -> None:
    """Raises SteeringRequestError if the edits and probes of a request have too many triggers or conditions."""
    triggers: set[Trigger] = set()
    conditions: set[Condition] = set()
    for scope in [edit.scope for edit in edits] + [probe.scope for probe in probes]:
        triggers.update(trigger for trigger in (scope.trigger, scope.exclude) if trigger is not None)
    for edit in edits:
        conditions.update(edit.when.conditions if edit.when else ())
    for what, count, most, name in (
        ("triggers", len(triggers), limits.max_triggers, "max_triggers"),
        ("conditions", len(conditions), limits.max_conditions, "max_conditions"),
    ):
        if count > most:
            raise SteeringRequestError(
                f"The edits have {count} different {what}; one request may have at most {most} ({name}).",
                "steering.edits",
            )
