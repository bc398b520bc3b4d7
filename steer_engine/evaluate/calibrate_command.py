"""`steer-engine calibrate`: the dose that helps a task most at a bounded price."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_engine.evaluate import engine_options as option


def calibrate_command(
    model: Annotated[str, option.MODEL],
    vector: Annotated[Path, typer.Argument(help="Vector file to calibrate.", metavar="VECTOR")],
    task: Annotated[str, option.TASK],
    out: Annotated[Path, option.OUT],
    save_as: Annotated[Path | None, typer.Option(help="Vector file to write (default: in the folder).")] = None,
    max_kl: Annotated[float, typer.Option(min=0, help="Largest mean KL on neutral texts, nats.")] = 0.1,
    blocks: Annotated[list[str] | None, option.BLOCKS] = None,
    alphas: Annotated[str, option.ALPHAS] = "-2:2:0.25",
    unit: Annotated[str, option.UNIT] = "vector",
    scope: Annotated[str, option.SCOPE] = "all",
    score: Annotated[str, option.SCORE] = "accuracy",
    derive_items: Annotated[int, option.DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, option.VALIDATION_ITEMS] = 200,
    test_items: Annotated[int, option.TEST_ITEMS] = 500,
    shots: Annotated[int, option.SHOTS] = 0,
    chat: Annotated[bool, option.CHAT] = False,
    seed: Annotated[int, option.SEED] = 0,
    dtype: Annotated[str, option.DTYPE] = "auto",
    max_model_len: Annotated[int | None, option.MAX_MODEL_LEN] = None,
    tensor_parallel_size: Annotated[int, option.TENSOR_PARALLEL] = 1,
) -> None:
    """Find the blocks and strength with the best score whose mean KL on neutral texts stays within a bound, try them
    on test items, and note them in the vector's metadata. Its content and digest stay as they are.

    Example: steer-engine calibrate smollm2-135m cheerful.safetensors --task mood.jsonl --out results/mood
    """
    from steer_engine.errors import EvaluationError
    from steer_engine.evaluate.calibration import calibrated
    from steer_engine.evaluate.evaluation import Evaluation
    from steer_engine.evaluate.files import write_results
    from steer_engine.evaluate.options import command_line, plan_of, say, vectors_of
    from steer_engine.evaluate.plots import require_matplotlib
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
