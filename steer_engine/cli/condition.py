"""`steer-engine condition`: when to steer. Nothing heavy loads before a command runs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from steer_engine.cli.checks import check_capture
from steer_engine.cli.derive import say
from steer_engine.cli.engine_options import CaptureOptions, ModelOption, captures
from steer_engine.cli.registry import new_table, print_table
from steer_engine.errors import DerivationError
from steer_engine.fields import block_ranges

if TYPE_CHECKING:
    from rich.table import Table

    from steer_engine.derive.condition import Candidate, ConditionFit
    from steer_engine.vectors.metadata import At, Measure

PLOT_SUFFIXES = (".svg", ".png")

Prompts = "a .txt file with one per line, a JSONL file with `text` per line or with pairs, or hf:DATASET?text=COLUMN."

app = typer.Typer(no_args_is_help=True, help="Conditions: steer a request only if its prompt calls for it.")


@app.command()
@captures
def fit(
    vector: Annotated[Path, typer.Argument(help="Vector file whose directions detect the prompts.", metavar="VECTOR")],
    model: ModelOption,
    positive: Annotated[str, typer.Option(help=f"Prompts that shall be steered: {Prompts}")],
    negative: Annotated[str, typer.Option(help="Prompts that shall not be steered, in the same forms.")],
    at: Annotated[
        str,
        typer.Option(
            help="Prompt tokens that count: last_prompt_token, mean_prompt or max_prompt (the largest number)."
        ),
    ] = "last_prompt_token",
    measure: Annotated[
        str, typer.Option(help="Number of a token: `cosine` of stream and direction, or their `dot` product.")
    ] = "cosine",
    blocks: Annotated[
        str,
        typer.Option(
            help="Candidates among the vector's blocks: `all`, `8-22`, `14`. Take some before the last one to steer."
        ),
    ] = "all",
    num_blocks: Annotated[
        int, typer.Option(min=1, help="Best blocks to combine: their mean, or for max_prompt their largest value.")
    ] = 1,
    held_out: Annotated[
        float, typer.Option(min=0.05, max=0.9, help="Share of each class that the result is only measured on.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of held-out prompts.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Vector file to write: .safetensors or .gguf (default: VECTOR itself).")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to write, .svg or .png (default: NAME.condition.svg, beside the vector)."),
    ] = None,
    *,
    capture: CaptureOptions,
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing output files, and a condition that VECTOR already has.")
    ] = False,
) -> None:
    """Find the blocks and the threshold at which a vector tells two kinds of prompts apart.

    The model reads the prompts of both files. For each block, the value of a prompt is the projection of the residual
    stream on the vector. Blocks and threshold (the best F1) are chosen on 70 % of the prompts, and F1, precision,
    recall and AUROC are measured on the others. The AUROC says how often the values of a positive and a negative
    prompt are in the right order: 0.5 is chance.

    The condition is stored in the vector's metadata (its digest does not change) and printed as JSON, the value of
    `when` in a request. Fit with the form that requests have: --chat if they are chats. A vector that is derived from
    such prompts (derive --chat --position last) is a good detector; it need not be the vector that steers.

    Example: steer-engine condition fit medical.safetensors --model smollm2-135m --positive medical.txt
    --negative other.txt
    """
    from steer_engine.derive.condition_fit import fit_condition
    from steer_engine.derive.derivation import require_writable
    from steer_engine.vectors.files import load, save
    from steer_engine.vectors.storage import write_atomically

    loaded = load(vector)
    target = out or vector
    # In place, the file exists, and only a condition in it would be lost.
    remedy = "Leave that block out of the vector, or give --out"
    require_writable(target, force=force or out is None, blocks=loaded.blocks, remedy=remedy)
    if out is None and loaded.metadata.condition is not None and not force:
        raise DerivationError(f"{vector}: it has a condition already; choose another file with --out, or --force.")
    picture = picture_path(plot, target, "condition", force=force)
    check_capture(model, blocks, ray_address=capture.ray_address)
    found = fit_condition(
        model,
        loaded,
        positive,
        negative,
        at=cast("At", at),
        measure=cast("Measure", measure),
        blocks=blocks,
        num_blocks=num_blocks,
        held_out=held_out,
        seed=seed,
        **capture.arguments,
    )
    _print(found)
    found.require_useful()
    save(loaded.with_metadata(condition=found.condition), target)
    say(f"{target}: {found.condition}")
    if picture is not None:
        from steer_engine.evaluate.plots import condition as draw

        write_atomically(picture, draw(found, picture.suffix))
        say(f"{picture}: written")
    typer.echo(json.dumps({"when": found.condition.when(target.stem)}))


def picture_path(plot: Path | None, target: Path, kind: str, *, force: bool) -> Path | None:
    """Where a picture is written: `plot`, or NAME.KIND.svg beside `target`.

    None without matplotlib, if no picture was requested.

    Raises:
        DerivationError: the suffix is unknown, or the file exists and `force` is not given.
        EvaluationError: a picture was requested, and matplotlib is not installed.
    """
    path = plot or target.with_suffix(f".{kind}.svg")
    if path.suffix not in PLOT_SUFFIXES:
        raise DerivationError(f"{path}: the name of a picture must end in {' or '.join(PLOT_SUFFIXES)}.")
    from steer_engine.derive.derivation import require_absent

    require_absent(path, force=force)
    if plot is None and find_spec("matplotlib") is None:
        say("No picture is drawn without matplotlib: pip install 'steer-engine[report]'.")
        return None
    from steer_engine.evaluate.plots import require_matplotlib

    require_matplotlib()
    return path


def _print(found: ConditionFit) -> None:
    """The table of all blocks, the quality of the chosen ones, and warnings, on standard error."""
    print_table(table_of(found), stderr=True)
    quality = found.chosen.held_out
    say(
        f"On {quality.num_positive} positive and {quality.num_negative} negative held-out prompts: "
        f"F1 {quality.f1:.3f}, precision {quality.precision:.3f}, recall {quality.recall:.3f}, "
        f"accuracy {quality.accuracy:.3f}, AUROC {quality.auroc:.3f}."
    )
    for sentence in found.warnings():
        say(f"warning: {sentence}")


def table_of(found: ConditionFit) -> Table:
    """Quality per block, and of the chosen blocks together."""
    table = new_table(
        "block", "training\nAUROC", "training\nF1", "held-out\nAUROC", "held-out\nF1", "holds", "", folded=("block",)
    )
    rows: list[Candidate] = list(found.by_block.values())
    if found.chosen not in rows:
        rows.append(found.chosen)
    for each in rows:
        cut, held_out = each.cut, each.held_out
        table.add_row(
            block_ranges(each.blocks),
            f"{each.auroc:.3f}",
            f"{cut.f1:.3f}",
            f"{held_out.auroc:.3f}",
            f"{held_out.f1:.3f}",
            f"{'above' if cut.above else 'below'} {cut.threshold:.4g}",
            "chosen" if each is found.chosen else "",
        )
    return table
