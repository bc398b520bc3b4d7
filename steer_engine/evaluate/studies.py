"""Evaluations from Python and notebooks: `sweep`, `evaluate` and `calibrate`, with the settings of the commands.

    llm = LLM("smollm2-135m", capture=True, enforce_eager=True)
    found = sweep(llm, vector, "ioi", blocks=["15"], alphas=[-1, 0.5, 1])
    found.to_frame()
    found.plot("accuracy")

Everything that needs no engine is checked before one starts. A living `LLM` is used as it is and stays up.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from steer_engine.derive.capture_config import name_of
from steer_engine.derive.derivation import require_absent
from steer_engine.derive.methods import require_method
from steer_engine.derive.progress import Progress
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import BASELINE, Against, Unit
from steer_engine.evaluate.encode import Encoder
from steer_engine.evaluate.evaluation import Evaluation
from steer_engine.evaluate.items import Sizes, Task
from steer_engine.evaluate.journal import Journal
from steer_engine.evaluate.outcome import Outcome, Point, Sweep, calibrated
from steer_engine.evaluate.plan import DEFAULT_ALPHAS, Plan, Recipe, Score
from steer_engine.evaluate.scorer import Scorer, open_engine
from steer_engine.evaluate.sweep import sweep as measure
from steer_engine.evaluate.tasks import load_task, neutral_texts
from steer_engine.fields import block_ranges
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load, save

if TYPE_CHECKING:
    from steer_engine.llm import LLM

PathLike = str | os.PathLike[str]
Vectors = ControlVector | PathLike | Mapping[str, ControlVector] | Iterable[PathLike]
"""A vector, a file, vectors by name, or files; a file is named by its stem."""

Split = Literal["validation", "test"]


class Settings(TypedDict, total=False):
    """Keyword arguments that `sweep`, `evaluate` and `calibrate` share.

    blocks: ranges to try, such as `["15", "10-19"]` (default: single blocks at a third, half and two thirds).
    alphas: strengths to try. unit: of the strengths, `"vector"` or `"residual"`. scope: token positions to steer.
    sizes: number of items of each split. shots: solved examples before each prompt. seed: of items and controls.
    chat: apply the model's chat template. max_tokens: to generate for an exact match.
    folder: for the journal; a second call with the same settings resumes from it (default: a temporary folder).
    progress: show progress. engine_args: arguments of an engine that is started, such as `{"dtype": "float32"}`.
    """

    blocks: Sequence[str]
    alphas: Sequence[float]
    unit: Unit
    scope: str
    sizes: Sizes
    shots: int
    seed: int
    chat: bool
    max_tokens: int
    folder: PathLike | None
    progress: bool
    engine_args: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The vector with the strength that was found in its metadata, and the evaluation that found it."""

    vector: ControlVector
    outcome: Outcome


def sweep(
    model: str | LLM,
    vectors: Vectors,
    task: PathLike | Task,
    *,
    split: Split = "validation",
    **settings: Unpack[Settings],
) -> Sweep:
    """Measure vectors on the items of one split, at every strength and block range, and on neutral texts.

    Chooses nothing and tests nothing: for that, see `evaluate`.

    Args:
        model: name, path or id, or a living `LLM`. task: `"ioi"`, `"babi15"`, `"babi16"`, a JSONL file, or a `Task`.
        settings: see `Settings`.

    Raises:
        EvaluationError: a setting or the task is unusable. ModelMismatchError: a vector does not fit the model.
    """
    if split not in ("validation", "test"):
        raise EvaluationError(f"split {split!r} is none of validation, test.")
    named, loaded = _vectors_of(vectors), _task_of(task, settings)
    plan = _plan(settings, vectors=named)
    with _engine(model, named.values(), settings) as llm, _folder(settings) as folder:
        generate, chat = settings.get("max_tokens", 32), settings.get("chat", False)
        for vector in named.values():
            vector.check(hidden_size=llm.hidden_size, num_blocks=llm.num_blocks)
        grids = [plan.grid(name, vector, llm.num_blocks) for name, vector in named.items()]
        for vector in named.values():
            llm.vectors.add(vector.digest.replace(":", "-"), vector)
        conditions = [BASELINE, *(condition for grid in grids for condition in grid)]
        encoder = Encoder(llm.get_tokenizer(), max_tokens=int(llm.model_config.max_model_len), chat=chat)
        questions = {
            split: encoder.questions(getattr(loaded, split), generate=generate),
            "neutral": encoder.neutral(neutral_texts()),
        }
        facts = {
            "model": name_of(model), "task": loaded.name, "task_digest": loaded.digest, "seed": plan.seed, "chat": chat,
            "generate": generate, "unit": plan.unit, "scope": plan.scope,
            "dtype": str(llm.model_config.dtype).removeprefix("torch."),
        }  # fmt: skip
        shows = settings.get("progress", True)
        with Progress(enabled=shows) as shown, Journal(folder / "sweep.jsonl", facts) as journal:
            points = []
            for name, asked in questions.items():
                total = len(asked) * len({condition.key for condition in conditions})
                with shown.counting(f"scoring {name}:", total=total, unit="answers") as advance:
                    tables = measure(Scorer(llm, generate=generate), journal, name, asked, conditions, advance)
                points += [Point.of(name, condition, tables[condition.key]) for condition in conditions]
    return Sweep(facts=facts, points=points)


def evaluate(
    model: str | LLM,
    task: PathLike | Task,
    *,
    vectors: Vectors | None = None,
    methods: Sequence[str] | None = None,
    against: Against = "wrong",
    preserve_norm: bool = False,
    score: Score = "accuracy",
    max_kl: float | None = None,
    random_controls: int = 1,
    **settings: Unpack[Settings],
) -> Outcome:
    """Choose blocks and strength on the validation items and report on the test items, with controls.

    Args, as of `sweep`, and:
        vectors: to evaluate. methods: to derive vectors from the task's own items (default: `["diffmean"]` if there are
            no vectors). against: `"wrong"` answers or `"random"` text as negatives.
        score: metric to maximise on validation. max_kl: largest mean KL on neutral texts, in nats.

    Raises:
        EvaluationError, DerivationError: a setting or the task is unusable, or gives no direction.
        ModelMismatchError: a vector does not fit the model.
    """
    chosen = methods if methods is not None else (["diffmean"] if vectors is None else [])
    recipes = tuple(Recipe(method=require_method(method), against=against) for method in chosen)
    loaded = _task_of(task, settings)
    plan = _plan(
        settings, recipes=recipes, vectors={} if vectors is None else _vectors_of(vectors), preserve_norm=preserve_norm,
        score=score, max_kl=max_kl, random_controls=random_controls,
    )  # fmt: skip
    return _run(model, loaded, plan, settings)


def calibrate(
    model: str | LLM,
    vector: ControlVector | PathLike,
    task: PathLike | Task,
    *,
    out: PathLike | None = None,
    force: bool = False,
    max_kl: float = 0.1,
    score: Score = "accuracy",
    **settings: Unpack[Settings],
) -> Calibration:
    """Find the best blocks and strength of a vector whose mean KL on neutral texts stays within `max_kl` nats.

    Args, as of `evaluate`, and:
        out: file to save the calibrated vector to, `.safetensors`. An existing one is replaced only with `force`.

    Raises:
        EvaluationError: as `evaluate`, or no strength stays within the bound.
    """
    if out is not None:
        if Path(out).suffix != ".safetensors":
            raise EvaluationError(f"{out}: a calibrated vector needs the suffix .safetensors.")
        require_absent(Path(out), force=force)
    named = _vectors_of(vector)
    plan = _plan(settings, vectors=named, score=score, max_kl=max_kl)
    outcome = _run(model, _task_of(task, settings), plan, settings)
    (given,) = named.values()
    made = calibrated(given, outcome)
    if out is not None:
        save(made, Path(out))
    return Calibration(vector=made, outcome=outcome)


def _run(model: str | LLM, task: Task, plan: Plan, settings: Settings) -> Outcome:
    with _engine(model, plan.vectors.values(), settings) as llm, _folder(settings) as folder:
        if missing := sorted(set(range(llm.num_blocks)) - set(llm.capture_blocks)):
            raise EvaluationError(
                f"This LLM does not capture blocks {block_ranges(missing)}, which the controls need; make it with "
                "LLM(model, capture=True)."
            )
        return Evaluation(
            llm, task, plan, folder, model=name_of(model), chat=settings.get("chat", False),
            generate=settings.get("max_tokens", 32), progress=settings.get("progress", True),
        ).run()  # fmt: skip


def _plan(settings: Settings, **more: Any) -> Plan:
    known = set(Settings.__annotations__)
    if unknown := sorted(set(settings) - known):
        raise EvaluationError(f"Unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    blocks = settings.get("blocks", ())
    return Plan(
        blocks=(blocks,) if isinstance(blocks, str) else tuple(map(str, blocks)),
        alphas=tuple(sorted({float(alpha) for alpha in settings.get("alphas", DEFAULT_ALPHAS)})),
        unit=settings.get("unit", "vector"),
        scope=settings.get("scope", "all"),
        seed=settings.get("seed", 0),
        **more,
    )


def _task_of(task: PathLike | Task, settings: Settings) -> Task:
    if isinstance(task, Task):
        return task
    sizes = settings.get("sizes", Sizes())
    return load_task(str(task), sizes, seed=settings.get("seed", 0), shots=settings.get("shots", 0))


def _vectors_of(vectors: Vectors) -> dict[str, ControlVector]:
    if isinstance(vectors, ControlVector):
        return {"vector": vectors}
    if isinstance(vectors, Mapping):
        return dict(vectors)
    files = [vectors] if isinstance(vectors, str | os.PathLike) else list(vectors)
    found = {Path(file).stem: load(Path(file)) for file in files}
    if len(found) < len(files):
        raise EvaluationError("Two vector files have the same name; rename one, since results use the name.")
    return found


@contextmanager
def _engine(model: str | LLM, vectors: Iterable[ControlVector], settings: Settings) -> Iterator[LLM]:
    arguments = settings.get("engine_args")
    if isinstance(model, str):
        yield open_engine(model, vectors=vectors, **dict(arguments or {}))
        return
    if arguments:
        raise EvaluationError("engine_args are for an engine that is started here; leave them out with a living LLM.")
    yield model


@contextmanager
def _folder(settings: Settings) -> Iterator[Path]:
    given = settings.get("folder")
    if given is not None:
        yield Path(given)
        return
    with TemporaryDirectory(prefix="steer-engine-") as folder:
        yield Path(folder)
