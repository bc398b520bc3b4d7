"""Options that all commands of this package have."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from steer_engine.derive.methods import require_method
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import Against
from steer_engine.evaluate.outcome import Outcome
from steer_engine.evaluate.plan import Plan, Recipe, parse_alphas
from steer_engine.evaluate.report import sentence, warnings
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load

MODEL = typer.Argument(help="Path, Hugging Face id, or a packaged model.", metavar="MODEL")
DTYPE = typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")
TASK = typer.Option(help="ioi, babi15, babi16, or a JSONL file.")
OUT = typer.Option(help="Folder for results, report and what a stopped run goes on from.")
BLOCKS = typer.Option(help="Blocks to try, such as 15 or 10-19; may be repeated.")
ALPHAS = typer.Option(help="Strengths: first:last:step, or a list with commas.")
UNIT = typer.Option(help="Of strengths: `vector`, or `residual` norms.")
SCOPE = typer.Option(help="Positions steered: all, prompt or generation.")
SCORE = typer.Option(help="Maximised on validation: accuracy or share_correct.")
DERIVE_ITEMS = typer.Option(min=2, help="Items that vectors are derived from.")
VALIDATION_ITEMS = typer.Option(min=2, help="Items that blocks and strength are chosen on.")
TEST_ITEMS = typer.Option(min=2, help="Items that the result is reported on.")
SHOTS = typer.Option(min=0, help="Solved examples before each prompt.")
CHAT = typer.Option("--chat", help="Prompts go through the model's chat template.")
SEED = typer.Option(help="Of items, contrasts and controls.")
MAX_MODEL_LEN = typer.Option(min=2, help="Longest prompt in tokens (default: what the model says).")
TENSOR_PARALLEL = typer.Option(min=1, help="GPUs that the engine is split over.")


def checked(option: str, value: str, valid: Sequence[str]) -> Any:
    """The value, or EvaluationError with the valid ones."""
    if value not in valid:
        raise EvaluationError(f"{option} {value[:64]!r} is none of {', '.join(valid)}.")
    return value


def recipes_of(methods: Sequence[str], against: str) -> tuple[Recipe, ...]:
    """Vectors to derive from the task. Raises DerivationError, EvaluationError for names that there are not."""
    contrast = cast(Against, checked("--against", against, ("wrong", "random")))
    return tuple(Recipe(method=require_method(method), against=contrast) for method in methods)


def vectors_of(files: Sequence[Path]) -> dict[str, ControlVector]:
    """Vectors by the stem of their file."""
    vectors = {file.stem: load(file) for file in files}
    if len(vectors) < len(files):
        raise EvaluationError("Two of the vector files have the same name; results tell vectors apart by it.")
    return vectors


def plan_of(*, alphas: str, unit: str, scope: str, score: str, **settings: Any) -> Plan:
    """A plan from options as they were typed."""
    return Plan(
        alphas=parse_alphas(alphas),
        unit=checked("--unit", unit, ("vector", "residual")),
        scope=checked("--scope", scope, ("all", "prompt", "generation")),
        score=checked("--score", score, ("accuracy", "share_correct")),
        **settings,
    )


def command_line() -> str:
    """How this process was called, for a report."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def say(outcome: Outcome, page: Path) -> None:
    """The verdicts and where the page is, on standard output."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for verdict in outcome.verdicts:
        console.print(f"{verdict.vector}: {sentence(verdict)}")
        for warning in warnings(verdict):
            console.print(f"  {warning}")
    console.print(f"report: {page}")


def calibrate_command(
    model: Annotated[str, MODEL],
    vector: Annotated[Path, typer.Argument(help="Vector file to calibrate.", metavar="VECTOR")],
    task: Annotated[str, TASK],
    out: Annotated[Path, OUT],
    save_as: Annotated[Path | None, typer.Option(help="Vector file to write (default: in the folder).")] = None,
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
    chat: Annotated[bool, CHAT] = False,
    seed: Annotated[int, SEED] = 0,
    dtype: Annotated[str, DTYPE] = "auto",
    max_model_len: Annotated[int | None, MAX_MODEL_LEN] = None,
    tensor_parallel_size: Annotated[int, TENSOR_PARALLEL] = 1,
) -> None:
    """Find the blocks and strength with the best score whose mean KL on neutral texts stays within a bound, try them
    on test items, and note them in the vector's metadata. Its content and digest stay as they are.

    Example: steer-engine calibrate smollm2-135m cheerful.safetensors --task mood.jsonl --out results/mood
    """
    from steer_engine.errors import EvaluationError
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
            f"{target}: a calibrated vector's file ends in .safetensors; GGUF has no room for the dose."
        )
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    loaded = load_task(task, sizes, seed=seed, shots=shots)
    vectors = vectors_of([vector])
    plan = plan_of(
        vectors=vectors, blocks=tuple(blocks or ()), alphas=alphas, unit=unit, scope=scope, score=score, max_kl=max_kl,
        seed=seed,
    )  # fmt: skip
    llm = open_engine(model, dtype=dtype, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size)
    outcome = Evaluation(llm, loaded, plan, out, model=model, chat=chat, command=command_line()).run()
    save(calibrated(vectors[vector.stem], outcome), target)
    say(outcome, write_results(outcome, out))
    typer.echo(f"calibrated vector: {target}")


def eval_command(
    model: Annotated[str, MODEL],
    task: Annotated[str, TASK],
    out: Annotated[Path, OUT],
    vector: Annotated[list[Path] | None, typer.Option(help="Vector file to evaluate; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Derive a vector from the task's own items; may be repeated.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="What right answers are set against: `wrong` ones or `random` text.")
    ] = "wrong",
    blocks: Annotated[list[str] | None, BLOCKS] = None,
    alphas: Annotated[str, ALPHAS] = "-2:2:0.5",
    unit: Annotated[str, UNIT] = "vector",
    scope: Annotated[str, SCOPE] = "all",
    preserve_norm: Annotated[bool, typer.Option("--preserve-norm", help="Rescale to the old norm.")] = False,
    score: Annotated[str, SCORE] = "accuracy",
    max_kl: Annotated[float | None, typer.Option(min=0, help="Largest mean KL on neutral texts, nats.")] = None,
    derive_items: Annotated[int, DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, VALIDATION_ITEMS] = 200,
    test_items: Annotated[int, TEST_ITEMS] = 1000,
    shots: Annotated[int, SHOTS] = 0,
    random_controls: Annotated[int, typer.Option(min=0, help="Random directions to compare with.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated for an exact match.")] = 32,
    chat: Annotated[bool, CHAT] = False,
    seed: Annotated[int, SEED] = 0,
    dtype: Annotated[str, DTYPE] = "auto",
    max_model_len: Annotated[int | None, MAX_MODEL_LEN] = None,
    tensor_parallel_size: Annotated[int, TENSOR_PARALLEL] = 1,
) -> None:
    """Choose block and strength on one set of items, and report on another, with controls.

    Example: steer-engine eval smollm2-135m --task ioi --method diffmean --out results/ioi
    """
    from steer_engine.evaluate.evaluation import Evaluation
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.report import write_results
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import Sizes, load_task

    # All that can be wrong without a model, before the minute that a model takes.
    require_matplotlib()
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    loaded = load_task(task, sizes, seed=seed, shots=shots)
    plan = plan_of(
        recipes=recipes_of(method or ([] if vector else ["diffmean"]), against),
        vectors=vectors_of(vector or []),
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
    llm = open_engine(model, dtype=dtype, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size)
    outcome = Evaluation(
        llm, loaded, plan, out, model=model, chat=chat, generate=max_tokens, command=command_line()
    ).run()
    say(outcome, write_results(outcome, out))


def paper_command(
    model: Annotated[str, MODEL],
    out: Annotated[Path, OUT],
    task: Annotated[
        list[str] | None, typer.Option(help="ioi, babi15, babi16 (default: all three), or JSONL files.")
    ] = None,
    alphas: Annotated[str, ALPHAS] = "-1:1:0.1",
    derive_items: Annotated[int, DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, VALIDATION_ITEMS] = 100,
    test_items: Annotated[int, TEST_ITEMS] = 1000,
    shots: Annotated[int, SHOTS] = 0,
    chat: Annotated[bool, CHAT] = False,
    seed: Annotated[int, SEED] = 0,
    dtype: Annotated[str, DTYPE] = "auto",
    max_model_len: Annotated[int | None, MAX_MODEL_LEN] = None,
    tensor_parallel_size: Annotated[int, TENSOR_PARALLEL] = 1,
) -> None:
    """Reading, contrastive and PCA vectors at the middle block over the paper's strengths, and ours beside them.

    The paper took --alphas=-1:1:0.1 for Pythia and --alphas=-3:3:0.1 for Mistral-7B-Instruct.
    Example: steer-engine paper smollm2-135m --out results/paper
    """
    from steer_engine.evaluate.paper import folder_of, index_page, markdown, run_paper
    from steer_engine.evaluate.plan import parse_alphas
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import TASKS, Sizes, load_task
    from steer_engine.vectors.storage import write_atomically

    require_matplotlib()
    strengths = parse_alphas(alphas)
    sizes = Sizes(derive=derive_items, validation=validation_items, test=test_items)
    tasks = [load_task(name, sizes, seed=seed, shots=shots) for name in task or TASKS]
    llm = open_engine(model, dtype=dtype, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size)
    runs = []
    for loaded in tasks:
        folder = out / folder_of(loaded.name)
        runs.append(
            run_paper(llm, loaded, folder, alphas=strengths, seed=seed, model=model, chat=chat, command=command_line())
        )
        write_atomically(out / "paper.md", markdown(runs).encode())
        write_atomically(out / "index.html", index_page(runs).encode())
    typer.echo(markdown(runs))
