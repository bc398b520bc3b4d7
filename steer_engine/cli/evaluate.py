"""The commands `eval`, `search`, `calibrate` and `paper`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from steer_engine.cli.checks import check_model
from steer_engine.cli.engine_options import Chat, EngineChoice, Model, starts_engine
from steer_engine.derive.derivation import require_absent
from steer_engine.derive.methods import require_method
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import Against
from steer_engine.evaluate.outcome import Outcome
from steer_engine.evaluate.plan import Plan, Recipe, parse_alphas
from steer_engine.evaluate.prompt_vectors import INSTRUCTION, KINDS
from steer_engine.evaluate.reasoning_tasks import MAKERS
from steer_engine.evaluate.report import sentence, warnings
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load

TASK = typer.Option(help="Task: a packaged one, such as ioi or key-value, or a JSONL file.")
OUT = typer.Option(help="Folder for results and report; an interrupted run resumes from it.")
BLOCKS = typer.Option(help="Blocks to try, such as 15 or 10-19; may be repeated.")
ALPHAS = typer.Option(help="Strengths: first:last:step, or a list with commas.")
UNIT = typer.Option(help="Unit of strengths: `vector`, or `residual` (mean residual norm).")
SCOPE = typer.Option(help="Token positions to steer: all, prompt or generation.")
SCORE = typer.Option(help="Metric to maximise on validation: accuracy or share_correct.")
DERIVE_ITEMS = typer.Option(min=2, help="Number of items to derive vectors from.")
VALIDATION_ITEMS = typer.Option(min=2, help="Number of items to choose blocks and strength on.")
TEST_ITEMS = typer.Option(min=2, help="Number of items to report the result on.")
SHOTS = typer.Option(min=0, help="Solved examples before each prompt.")
SEED = typer.Option(help="Seed of items, contrasts and controls.")

MODULES = ("vllm", "scipy")
"""Modules that an evaluation needs. matplotlib is checked apart."""

Name = TypeVar("Name", bound=str)


@starts_engine
def eval_command(
    model: Model,
    task: Annotated[str, TASK],
    out: Annotated[Path, OUT],
    vector: Annotated[list[Path] | None, typer.Option(help="Vector file to evaluate; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to derive a vector from the task's items; may be repeated.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="Negatives to contrast right answers with: `wrong` answers or `random` text.")
    ] = "wrong",
    blocks: Annotated[list[str] | None, BLOCKS] = None,
    alphas: Annotated[str, ALPHAS] = "-2:2:0.5",
    unit: Annotated[str, UNIT] = "vector",
    scope: Annotated[str, SCOPE] = "all",
    preserve_norm: Annotated[bool, typer.Option("--preserve-norm", help="Rescale to the unsteered norm.")] = False,
    score: Annotated[str, SCORE] = "accuracy",
    max_kl: Annotated[float | None, typer.Option(min=0, help="Largest mean KL on neutral texts, nats.")] = None,
    derive_items: Annotated[int, DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, VALIDATION_ITEMS] = 200,
    test_items: Annotated[int, TEST_ITEMS] = 1000,
    shots: Annotated[int, SHOTS] = 0,
    random_controls: Annotated[int, typer.Option(min=0, help="Number of random directions to compare with.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for an exact match.")] = 32,
    chat: Chat = False,
    seed: Annotated[int, SEED] = 0,
    *,
    engine: EngineChoice,
) -> None:
    """Choose blocks and strength on one set of items and report on another, with controls.

    Example: steer-engine eval smollm2-135m --task ioi --method diffmean --out results/ioi
    """
    from steer_engine.evaluate.evaluation import Evaluation
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.report import write_results
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import Sizes, load_task

    # Everything that can fail without a model runs before the model loads, which takes a minute.
    require_matplotlib()
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    loaded = load_task(task, sizes, seed=seed, shots=shots)
    plan = _plan_of(
        recipes=_recipes_of(method or ([] if vector else ["diffmean"]), against),
        vectors=_vectors_of(vector or []),
        blocks=tuple(blocks or ()),
        alphas=alphas,
        unit=unit,
        scope=scope,
        preserve_norm=preserve_norm,
        score=score,
        max_kl=max_kl,
        random_controls=random_controls,
        seed=seed,
    )
    require_folder(out)
    check_model(model, *(blocks or ()), modules=MODULES)
    llm = open_engine(model, vectors=plan.vectors.values(), **engine.engine_args)
    outcome = Evaluation(
        llm, loaded, plan, out, model=model, chat=chat, generate=max_tokens, command=_command_line()
    ).run()
    _print_verdicts(outcome, write_results(outcome, out))


@starts_engine
def search_command(
    tasks: Annotated[
        list[str],
        typer.Argument(help=f"JSONL files, packaged tasks, or `all` of these: {', '.join(MAKERS)}.", metavar="TASK..."),
    ],
    model: Model,
    out: Annotated[Path, OUT],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Vectors to derive: {', '.join(KINDS)} (default: shots, labels, format, correct); may be repeated."
        ),
    ] = None,
    blocks: Annotated[list[str] | None, BLOCKS] = None,
    alphas: Annotated[str, ALPHAS] = "-1,0.5,1,2,4",
    score: Annotated[str, typer.Option(help="Measure to maximise on validation: accuracy, balanced or auroc.")] = (
        "accuracy"
    ),
    shots: Annotated[int, typer.Option(min=1, help="Solved examples of the recipes, and of the few-shot prompt.")] = 10,
    instruction: Annotated[
        str, typer.Option(help="Text before the prompt, for the recipe and for the prompt that replaces it.")
    ] = INSTRUCTION,
    derive_items: Annotated[int, DERIVE_ITEMS] = 104,
    validation_items: Annotated[int, VALIDATION_ITEMS] = 200,
    test_items: Annotated[int, TEST_ITEMS] = 1000,
    random_controls: Annotated[int, typer.Option(min=1, help="Number of random directions to compare with.")] = 5,
    anyway: Annotated[bool, typer.Option("--anyway", help="Search tasks without headroom too.")] = False,
    chat: Chat = False,
    seed: Annotated[int, SEED] = 0,
    *,
    engine: EngineChoice,
) -> None:
    """Try every recipe, block and strength on validation items, and test one point per task against controls.

    Example: steer-engine search key-value compare smollm2-135m --out results/search
    """
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.report import write_search
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.search import Search, SearchPlan
    from steer_engine.evaluate.search_outcome import sentence as result_sentence
    from steer_engine.evaluate.tasks import Sizes, load_task

    require_matplotlib()
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    names = list(MAKERS) if tasks == ["all"] else tasks
    loaded = [load_task(name, sizes, seed=seed) for name in names]
    plan = SearchPlan(
        recipes=tuple(_checked("--recipe", name, KINDS) for name in recipe or ("shots", "labels", "format", "correct")),
        blocks=tuple(blocks or ()),
        alphas=parse_alphas(alphas),
        score=_checked("--score", score, ("accuracy", "balanced", "auroc")),
        shots=shots,
        instruction=instruction,
        random_controls=random_controls,
        seed=seed,
        anyway=anyway,
    )
    require_folder(out)
    check_model(model, *(blocks or ()), modules=MODULES)
    llm = open_engine(model, **engine.engine_args)
    outcome = Search(llm, loaded, plan, out, model=model, chat=chat, command=_command_line()).run()
    page = write_search(outcome, out)
    for result in outcome.results:
        typer.echo(f"{result.task}: {result_sentence(result)}")
    typer.echo(f"report: {page}")


@starts_engine
def calibrate_command(
    model: Model,
    vector: Annotated[Path, typer.Argument(help="Vector file to calibrate.", metavar="VECTOR")],
    task: Annotated[str, TASK],
    out: Annotated[Path, OUT],
    save_as: Annotated[Path | None, typer.Option(help="Vector file to write (default: in the --out folder).")] = None,
    max_kl: Annotated[float, typer.Option(min=0, help="Largest mean KL on neutral texts, nats.")] = 0.1,
    blocks: Annotated[list[str] | None, BLOCKS] = None,
    alphas: Annotated[str, ALPHAS] = "-2:2:0.25",
    unit: Annotated[str, UNIT] = "vector",
    scope: Annotated[str, SCOPE] = "all",
    score: Annotated[str, SCORE] = "accuracy",
    derive_items: Annotated[int, DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, VALIDATION_ITEMS] = 200,
    test_items: Annotated[int, TEST_ITEMS] = 500,
    shots: Annotated[int, SHOTS] = 0,
    chat: Chat = False,
    seed: Annotated[int, SEED] = 0,
    *,
    engine: EngineChoice,
) -> None:
    """Find the best blocks and strength of a vector whose mean KL on neutral texts stays within a bound.

    They are tested on separate items and written to the vector's metadata. Its content and digest do not change.

    Example: steer-engine calibrate smollm2-135m cheerful.safetensors --task mood.jsonl --out results/mood
    """
    from steer_engine.evaluate.evaluation import Evaluation
    from steer_engine.evaluate.outcome import calibrated
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.report import write_results
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import Sizes, load_task
    from steer_engine.vectors.files import save

    require_matplotlib()
    target = save_as or out / vector.with_suffix(".safetensors").name
    if target.suffix != ".safetensors":
        raise EvaluationError(
            f"{target}: a calibrated vector needs the suffix .safetensors; GGUF cannot store the suggested strength."
        )
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    loaded = load_task(task, sizes, seed=seed, shots=shots)
    vectors = _vectors_of([vector])
    plan = _plan_of(
        vectors=vectors, blocks=tuple(blocks or ()), alphas=alphas, unit=unit, scope=scope, score=score, max_kl=max_kl,
        seed=seed,
    )  # fmt: skip
    require_folder(out)
    require_absent(target, force=True)
    check_model(model, *(blocks or ()), modules=MODULES)
    llm = open_engine(model, vectors=plan.vectors.values(), **engine.engine_args)
    outcome = Evaluation(llm, loaded, plan, out, model=model, chat=chat, command=_command_line()).run()
    save(calibrated(vectors[vector.stem], outcome), target)
    _print_verdicts(outcome, write_results(outcome, out))
    typer.echo(f"calibrated vector: {target}")


@starts_engine
def paper_command(
    model: Model,
    out: Annotated[Path, OUT],
    task: Annotated[
        list[str] | None,
        typer.Option(help="ioi, babi15, babi16 (default: all three), or a JSONL file; may be repeated."),
    ] = None,
    alphas: Annotated[str, ALPHAS] = "-1:1:0.1",
    derive_items: Annotated[int, DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, VALIDATION_ITEMS] = 100,
    test_items: Annotated[int, TEST_ITEMS] = 1000,
    shots: Annotated[int, SHOTS] = 0,
    chat: Chat = False,
    seed: Annotated[int, SEED] = 0,
    *,
    engine: EngineChoice,
) -> None:
    """Run the protocol of Højer et al. (ICLR 2025) and ours: reading, contrastive and PCA vectors at the middle block.

    The paper used --alphas=-1:1:0.1 for Pythia and --alphas=-3:3:0.1 for Mistral-7B-Instruct.
    Example: steer-engine paper smollm2-135m --out results/paper
    """
    from steer_engine.evaluate.evaluation import run_paper
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.report import folder_of, paper_index, paper_markdown
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import PAPER_TASKS, Sizes, load_task
    from steer_engine.vectors.storage import write_atomically

    require_matplotlib()
    strengths = parse_alphas(alphas)
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    tasks = [load_task(name, sizes, seed=seed, shots=shots) for name in task or PAPER_TASKS]
    require_folder(out)
    check_model(model, modules=MODULES)
    llm = open_engine(model, **engine.engine_args)
    runs = []
    for loaded in tasks:
        folder = out / folder_of(loaded.name)
        runs.append(
            run_paper(llm, loaded, folder, alphas=strengths, seed=seed, model=model, chat=chat, command=_command_line())
        )
        write_atomically(out / "paper.md", paper_markdown(runs).encode())
        write_atomically(out / "index.html", paper_index(runs).encode())
    typer.echo(paper_markdown(runs))


def require_folder(out: Path) -> None:
    """Raise EvaluationError, before minutes of work, if results cannot be written to the folder `out`."""
    nearest = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())  # others are made
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise EvaluationError(f"--out {out}: {nearest} is not a folder that can be written to; choose another place.")


def _plan_of(*, alphas: str, unit: str, scope: str, score: str, **settings: Any) -> Plan:
    """A plan from the text of the options. Raises EvaluationError for an invalid value."""
    return Plan(
        alphas=parse_alphas(alphas),
        unit=_checked("--unit", unit, ("vector", "residual")),
        scope=_checked("--scope", scope, ("all", "prompt", "generation")),
        score=_checked("--score", score, ("accuracy", "share_correct")),
        **settings,
    )


def _recipes_of(methods: Sequence[str], against: str) -> tuple[Recipe, ...]:
    """Vectors to derive from the task. Raises DerivationError or EvaluationError for an unknown name."""
    contrast: Against = _checked("--against", against, ("wrong", "random"))
    return tuple(Recipe(method=require_method(method), against=contrast) for method in methods)


def _vectors_of(files: Sequence[Path]) -> dict[str, ControlVector]:
    """Load vectors, named by the stem of their file. Raises EvaluationError if two files have the same stem."""
    vectors = {file.stem: load(file) for file in files}
    if len(vectors) < len(files):
        raise EvaluationError("Two vector files have the same name; rename one, since results use the name.")
    return vectors


def _checked(option: str, value: str, valid: Sequence[Name]) -> Name:
    """The valid name that equals `value`. Raises EvaluationError if there is none."""
    for name in valid:
        if name == value:
            return name
    raise EvaluationError(f"{option} {value[:64]!r} is none of {', '.join(valid)}.")


def _command_line() -> str:
    """The command line of this process, for the report."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _print_verdicts(outcome: Outcome, page: Path) -> None:
    """Print the verdicts and the path of the report."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for verdict in outcome.verdicts:
        console.print(f"{verdict.vector}: {sentence(verdict)}")
        for warning in warnings(verdict):
            console.print(f"  {warning}")
    console.print(f"report: {page}")
