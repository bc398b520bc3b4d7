"""`steer-engine eval`: does a vector work, and at what price?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = typer.Argument(help="Path, Hugging Face id, or a packaged model.", metavar="MODEL")
DTYPE = typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")


def eval_command(
    model: Annotated[str, MODEL],
    task: Annotated[str, typer.Option(help="ioi, babi15, babi16, or a JSONL file.")],
    out: Annotated[Path, typer.Option(help="Folder for results, report and what a stopped run goes on from.")],
    vector: Annotated[list[Path] | None, typer.Option(help="Vector file to evaluate; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Derive a vector from the task's own items; may be repeated.")
    ] = None,
    against: Annotated[str, typer.Option(help="What right answers are set against: `wrong` ones or `random` text.")] = (
        "wrong"
    ),
    blocks: Annotated[
        list[str] | None, typer.Option(help="Blocks to try, such as 15 or 10-19; may be repeated.")
    ] = None,
    alphas: Annotated[str, typer.Option(help="Strengths: first:last:step, or a list with commas.")] = "-2:2:0.5",
    unit: Annotated[str, typer.Option(help="Of strengths: `vector`, or `residual` norms.")] = "vector",
    scope: Annotated[str, typer.Option(help="Positions steered: all, prompt or generation.")] = "all",
    preserve_norm: Annotated[bool, typer.Option("--preserve-norm", help="Rescale to the old norm.")] = False,
    score: Annotated[str, typer.Option(help="Maximised on validation: accuracy or share_correct.")] = "accuracy",
    max_kl: Annotated[float | None, typer.Option(min=0, help="Largest mean KL on validation, nats.")] = None,
    derive_items: Annotated[int, typer.Option(min=2)] = 200,
    validation_items: Annotated[int, typer.Option(min=2)] = 200,
    test_items: Annotated[int, typer.Option(min=2)] = 1000,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each prompt.")] = 0,
    random_controls: Annotated[int, typer.Option(min=0, help="Random directions to compare with.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated for an exact match.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts go through the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of items, contrasts and controls.")] = 0,
    dtype: Annotated[str, DTYPE] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Longest prompt in tokens.")] = None,
) -> None:
    """Choose block and strength on one set of items, and report on another, with controls.

    Example: steer-engine eval smollm2-135m --task ioi --method diffmean --out results/ioi
    """
    from steer_engine.evaluate.evaluation import Evaluation
    from steer_engine.evaluate.files import write_results
    from steer_engine.evaluate.options import command_line, plan_of, recipes_of, say, vectors_of
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import Sizes, load_task

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
    llm = open_engine(model, dtype=dtype, max_model_len=max_model_len)
    evaluation = Evaluation(llm, loaded, plan, out, model=model, chat=chat, generate=max_tokens, command=command_line())
    outcome = evaluation.run()
    say(outcome, write_results(outcome, out))
