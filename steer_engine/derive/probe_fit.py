"""`probe fit` and `probe report`: prompts of two classes in, a trained probe or its quality out.

Engines capture rows of the residual stream at the hook that serves probes; the rows are kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from steer_engine.derive.actors import Capturing, start_capturing
from steer_engine.derive.capture_config import EngineOptions, model_name
from steer_engine.derive.condition_fit import (
    Prompts,
    PromptSource,
    candidate_blocks,
    load_prompts,
    repeated,
    require_disjoint,
)
from steer_engine.derive.dump_folder import DumpManifest
from steer_engine.derive.dump_writer import chunks
from steer_engine.derive.fit import MAX_ROWS_BYTES
from steer_engine.derive.probe import MIN_PROMPTS, Examples, ProbeFit, fit_blocks, require_settings
from steer_engine.derive.probe_quality import ProbeReport, Scores, best_block, report_block
from steer_engine.derive.progress import Progress
from steer_engine.derive.texts import Texts, digest_of
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import ProbeAt

if TYPE_CHECKING:
    from steer_engine.llm import LLM

POSITIONS: dict[ProbeAt, str] = {"last_prompt_token": "last", "mean_prompt": "mean", "every_prompt_token": "all"}
"""Position rule of the rows that a probe is trained on."""


def fit_probe(
    model: str | LLM,
    positive: PromptSource,
    negative: PromptSource,
    *,
    method: str = "logistic",
    blocks: str | int | Iterable[int] = "all",
    site: str = "block",
    at: ProbeAt = "last_prompt_token",
    held_out: float = 0.3,
    rate: float = 0.01,
    seed: int = 0,
    **engine: Unpack[EngineOptions],
) -> ProbeFit:
    """Train a probe that tells prompts of two classes apart.

    Args, `EngineOptions` (see `derive`), and:
        positive: prompts at which the probe shall fire, as `load_prompts` reads them. negative: the others.
        method: `"diffmean"`, `"logistic"` or `"lda"`.
        site: as in `derive`.
        at: `"last_prompt_token"`, `"mean_prompt"`, or `"every_prompt_token"`: each token is an example by itself.
        held_out: share of each class that the quality is measured on; seed: of that split.
        rate: false-positive rate of the threshold.

    Raises:
        DerivationError: prompts or settings are unusable, or the classes do not differ at a block.
        UnsupportedEngineError: the model cannot be armed, or lacks a block.
    """
    require_settings(method, at, tuple(POSITIONS), held_out, rate)
    classes = _load(positive, negative)
    texts = _joined(classes)
    with start_capturing(
        model,
        source=texts.source,
        position=POSITIONS[at],
        blocks=blocks,
        site=site,
        **engine,
    ) as run:
        manifest = DumpManifest.of(run.config.model, run.config, run.facts, texts)
        examples = _capture(run, classes, manifest)
        captured = run.facts.blocks
    with (
        Progress(enabled=engine.get("progress", True)) as shown,
        shown.counting("fitting", total=len(captured), unit="blocks") as advance,
    ):
        fit = fit_blocks(
            examples[0],
            examples[1],
            captured,
            manifest.vector_metadata(method),
            at=at,
            method=method,
            held_out=held_out,
            rate=rate,
            seed=seed,
            chat=run.config.chat,
            advance=advance,
        )
    return replace(fit, held_out=replace(fit.held_out, notes=(*repeated(classes), *fit.held_out.notes)))


def report_probe(
    model: str | LLM,
    vector: ControlVector,
    positive: PromptSource,
    negative: PromptSource,
    *,
    blocks: str | int | Iterable[int] = "all",
    seed: int = 0,
    **engine: Unpack[EngineOptions],
) -> ProbeReport:
    """Measure a trained probe on prompts that it was not trained on, at the tokens that it was trained on.

    Args, as of `fit_probe`, and:
        blocks: those of the probe to measure. seed: of the bootstrap.
        chat: apply the chat template, also if the probe was not trained so. One that was always gets it.

    Raises:
        DerivationError: the vector has no probe, or prompts or settings are unusable.
        ModelMismatchError: the vector does not fit the model.
        UnsupportedEngineError: the model cannot be armed.
    """
    probe = vector.metadata.probe
    if probe is None:
        raise DerivationError("The vector has no probe in its metadata; train one with `steer-engine probe fit`.")
    trained = vector.restrict(probe.blocks)
    measured = candidate_blocks(trained, blocks)
    classes = _load(positive, negative)
    texts = _joined(classes)
    chat = engine.get("chat", False)
    options: EngineOptions = {**engine, "chat": chat or probe.chat}
    with start_capturing(
        model,
        source=texts.source,
        position=POSITIONS[probe.at],
        blocks=measured,
        site=vector.metadata.site,
        **options,
    ) as run:
        vector.check(hidden_size=run.facts.hidden_size, num_blocks=run.facts.num_blocks)
        examples = _capture(run, classes, DumpManifest.of(run.config.model, run.config, run.facts, texts))
    by_block = {}
    for index, block in enumerate(measured):
        direction_D = vector.directions[block].astype(np.float64)
        scores = [Scores(value_N=each.at(index) @ direction_D, prompt_N=each.prompt_N) for each in examples]
        by_block[block] = report_block(probe.blocks[block], *scores, seed=seed)
    notes = repeated(classes)
    made_for, name = vector.metadata.model, model_name(run.config.model)
    if made_for and made_for != name:
        notes.append(f"the probe was trained on {made_for[:64]!r}, and {name!r} is another name.")
    if chat and not probe.chat:
        notes.append("the probe was trained without the chat template; its threshold may not hold for chats.")
    return ProbeReport(
        by_block=by_block,
        best=best_block({block: probe.blocks[block].auroc for block in measured}),
        at=probe.at,
        num_positive=examples[0].num_prompts,
        num_negative=examples[1].num_prompts,
        notes=tuple(notes),
    )


def _load(positive: PromptSource, negative: PromptSource) -> tuple[Prompts, Prompts]:
    classes = (
        load_prompts(positive, "positive", least=MIN_PROMPTS, what="probe"),
        load_prompts(negative, "negative", least=MIN_PROMPTS, what="probe"),
    )
    require_disjoint(*classes)
    return classes


def _joined(classes: Sequence[Prompts]) -> Texts:
    """All prompts as single texts with their class as label."""
    items = tuple(replace(text, label=each.label, pair="") for each in classes for text in each.items)
    return Texts(items, digest_of(items), ", ".join(dict.fromkeys(each.source for each in classes)))


def _capture(run: Capturing, classes: Sequence[Prompts], manifest: DumpManifest) -> list[Examples]:
    """Rows of the prompts of each class.

    Of a prompt whose tokens are examples, the first row is left out if there are others: models park attention there,
    and its norm is many times that of any other row.

    Raises:
        DerivationError: the rows do not fit in memory, or a prompt is too long; names its file and line.
    """
    position = run.config.position
    found, num_bytes = [], 0
    for prompts in classes:
        rows: list[Any] = []
        prompt_N: list[int] = []
        norm_L, norm_count = np.zeros(len(run.facts.blocks)), 0
        parts = [[prompts.items[index] for index in chunk] for chunk in chunks(prompts.items, manifest)]
        with run.shown.counting("capturing", total=len(prompts.items), unit=f"{prompts.label} prompts") as advance:
            for captured in run.engines.capture_texts(parts, position, prompts.source):
                for index, text in enumerate(captured, start=prompt_N[-1] + 1 if prompt_N else 0):
                    kept_LPD = text.rows_LPD
                    if position.rule == "all" and kept_LPD.shape[1] > 1:
                        kept_LPD = kept_LPD[:, 1:]
                    rows.append(np.moveaxis(kept_LPD, 1, 0))
                    prompt_N += [index] * kept_LPD.shape[1]
                    norm_L += text.norm_L
                    norm_count += text.norm_count
                    num_bytes += kept_LPD.nbytes
                if num_bytes > MAX_ROWS_BYTES:
                    raise DerivationError(
                        f"The rows of these prompts at {len(run.facts.blocks)} block(s) take more than "
                        f"{MAX_ROWS_BYTES >> 20} MiB. Choose fewer --blocks or prompts, or --at last_prompt_token."
                    )
                advance(len(captured))
        found.append(
            Examples(
                rows_NLD=np.concatenate(rows),
                prompt_N=np.array(prompt_N, dtype=np.intp),
                norm_L=norm_L,
                norm_count=norm_count,
            )
        )
    return found
