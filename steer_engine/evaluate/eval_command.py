"""`steer-engine eval`: does a vector work, and at what price?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_engine.evaluate import engine_options as option


def eval_command(
    model: Annotated[str, option.MODEL],
    task: Annotated[str, option.TASK],
    out: Annotated[Path, option.OUT],
    vector: Annotated[list[Path] | None, typer.Option(help="Vector file to evaluate; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Derive a vector from the task's own items; may be repeated.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="What right answers are set against: `wrong` ones or `random` text.")
    ] = "wrong",
    blocks: Annotated[list[str] | None, option.BLOCKS] = None,
    alphas: Annotated[str, option.ALPHAS] = "-2:2:0.5",
    unit: Annotated[str, option.UNIT] = "vector",
    scope: Annotated[str, option.SCOPE] = "all",
    preserve_norm: Annotated[bool, typer.Option("--preserve-norm", help="Rescale to the old norm.")] = False,
    score: Annotated[str, option.SCORE] = "accuracy",
    max_kl: Annotated[float | None, typer.Option(min=0, help="Largest mean KL on neutral texts, nats.")] = None,
    derive_items: Annotated[int, option.DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, option.VALIDATION_ITEMS] = 200,
    test_items: Annotated[int, option.TEST_ITEMS] = 1000,
    shots: Annotated[int, option.SHOTS] = 0,
    random_controls: Annotated[int, typer.Option(min=0, help="Random directions to compare with.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated for an exact match.")] = 32,
    chat: Annotated[bool, option.CHAT] = False,
    seed: Annotated[int, option.SEED] = 0,
    dtype: Annotated[str, option.DTYPE] = "auto",
    max_model_len: Annotated[int | None, option.MAX_MODEL_LEN] = None,
    tensor_parallel_size: Annotated[int, option.TENSOR_PARALLEL] = 1,
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
