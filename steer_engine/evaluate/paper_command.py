"""`steer-engine paper`: the protocol of Højer et al. (ICLR 2025) as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_engine.evaluate import engine_options as option


def paper_command(
    model: Annotated[str, option.MODEL],
    out: Annotated[Path, option.OUT],
    task: Annotated[
        list[str] | None, typer.Option(help="ioi, babi15, babi16 (default: all three), or JSONL files.")
    ] = None,
    alphas: Annotated[str, option.ALPHAS] = "-1:1:0.1",
    derive_items: Annotated[int, option.DERIVE_ITEMS] = 200,
    validation_items: Annotated[int, option.VALIDATION_ITEMS] = 100,
    test_items: Annotated[int, option.TEST_ITEMS] = 1000,
    shots: Annotated[int, option.SHOTS] = 0,
    chat: Annotated[bool, option.CHAT] = False,
    seed: Annotated[int, option.SEED] = 0,
    dtype: Annotated[str, option.DTYPE] = "auto",
    max_model_len: Annotated[int | None, option.MAX_MODEL_LEN] = None,
    tensor_parallel_size: Annotated[int, option.TENSOR_PARALLEL] = 1,
) -> None:
    """Reading, contrastive and PCA vectors at the middle block over the paper's strengths, and ours beside them.

    The paper took --alphas=-1:1:0.1 for Pythia and --alphas=-3:3:0.1 for Mistral-7B-Instruct.
    Example: steer-engine paper smollm2-135m --out results/paper
    """
    from steer_engine.evaluate.options import command_line
    from steer_engine.evaluate.paper import folder_of, index_page, markdown, run_paper
    from steer_engine.evaluate.plan import parse_alphas
    from steer_engine.evaluate.plots import require_matplotlib
    from steer_engine.evaluate.scorer import open_engine
    from steer_engine.evaluate.tasks import TASKS, Sizes, load_task
    from steer_engine.vectors.atomic_write import write_atomically

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
