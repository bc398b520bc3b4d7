"""`steer-engine probe`: train a probe, and measure one. Nothing heavy loads before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from steer_engine.cli.checks import check_capture
from steer_engine.cli.condition import Prompts, picture_path
from steer_engine.cli.derive import say
from steer_engine.cli.engine_options import CaptureOptions, ModelOption, SiteOption, captures
from steer_engine.cli.registry import new_table, print_table
from steer_engine.errors import DerivationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from steer_engine.derive.probe_quality import ProbeReport
    from steer_engine.vectors.metadata import ProbeAt

Positive = Annotated[str, typer.Option(help=f"Prompts at which the probe shall fire: {Prompts}")]
Negative = Annotated[str, typer.Option(help="Prompts at which it shall not, in the same forms.")]

app = typer.Typer(no_args_is_help=True, help="Probes: directions that detect a property, trained on labelled prompts.")


@app.command()
@captures
def fit(
    model: ModelOption,
    positive: Positive,
    negative: Negative,
    out: Annotated[Path, typer.Option(help="Vector file to write: .safetensors, or .gguf.")],
    method: Annotated[
        str,
        typer.Option(help="logistic (standardised, L2), lda (with shrinkage), or diffmean (difference of the means)."),
    ] = "logistic",
    blocks: Annotated[str, typer.Option(help="Blocks to train at, from 0: `all`, `8-22`, `14`.")] = "all",
    site: SiteOption = "block",
    at: Annotated[
        str,
        typer.Option(
            help="Rows to train on: last_prompt_token, mean_prompt, or every_prompt_token (each token is an example)."
        ),
    ] = "last_prompt_token",
    held_out: Annotated[
        float, typer.Option(min=0.05, max=0.9, help="Share of each class that the quality is measured on.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of held-out prompts.")] = 0,
    fpr: Annotated[float, typer.Option(help="False-positive rate that the threshold shall keep.")] = 0.01,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write, .svg or .png (default: NAME.probe.svg, beside the vector).")
    ] = None,
    *,
    capture: CaptureOptions,
    force: Annotated[bool, typer.Option("--force", help="Replace existing output files.")] = False,
) -> None:
    """Train a probe: at each block, the direction v whose number <x, v> tells two kinds of prompts apart.

    The model reads the prompts of both files, and nothing is generated. Directions are fitted to 70 % of the prompts.
    Threshold (by the false-positive rate) and calibration (probability = sigmoid(a * <x, v> + b)) are fitted to the
    same prompts, each scored by a direction that did not see it. The quality is measured on the other 30 %: the AUROC
    says how often a positive has the larger number (0.5 is chance).

    The file is an ordinary vector: a request can probe with it, and steer with it.

    Example: steer-engine probe fit --model smollm2-135m --positive good.txt --negative bad.txt --blocks 8-20
    --out mood.safetensors
    """
    from steer_engine.derive.derivation import require_writable
    from steer_engine.derive.probe_fit import fit_probe
    from steer_engine.fields import parse_blocks
    from steer_engine.vectors.files import save

    try:
        numbers = parse_blocks(blocks)
    except ValueError as error:
        raise DerivationError(f"--blocks: {error}.") from None
    remedy = "Leave it out, for example with --blocks 1-29 for a model of 30 blocks"
    require_writable(out, force=force, blocks=numbers, site=site, remedy=remedy)
    picture = picture_path(plot, out, "probe", force=force)
    check_capture(model, blocks, ray_address=capture.ray_address)
    found = fit_probe(
        model,
        positive,
        negative,
        method=method,
        blocks=blocks,
        site=site,
        at=cast("ProbeAt", at),
        held_out=held_out,
        rate=fpr,
        seed=seed,
        **capture.arguments,
    )
    _print(found.held_out, found.auroc)
    found.require_useful()
    save(found.vector, out)
    say(f"{out}: {found.vector.metadata.probe}; {found.vector.digest}")
    _draw(found.held_out, picture)


@app.command()
@captures
def report(
    vector: Annotated[Path, typer.Argument(help="Vector file that `probe fit` wrote.", metavar="FILE")],
    model: ModelOption,
    positive: Positive,
    negative: Negative,
    blocks: Annotated[str, typer.Option(help="Blocks of the probe to measure: `all`, `8-22`, `14`.")] = "all",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap intervals.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write, .svg or .png (default: NAME.report.svg, beside the vector).")
    ] = None,
    *,
    capture: CaptureOptions,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing picture.")] = False,
) -> None:
    """Measure a probe on other prompts than those it was trained on.

    The table has, per block, the AUROC with its 95 % bootstrap interval over prompts, the true- and false-positive rate
    at the stored threshold, and the errors of the calibrated probability: ECE (mean distance between the probability
    and the share of positives) and Brier score (mean squared error; 0.25 is that of always saying one half).

    Example: steer-engine probe report mood.safetensors --model smollm2-135m --positive good2.txt --negative bad2.txt
    """
    from steer_engine.derive.probe_fit import report_probe
    from steer_engine.vectors.files import load

    loaded = load(vector)
    if loaded.metadata.probe is None:
        raise DerivationError(f"{vector}: it has no probe in its metadata; train one with `steer-engine probe fit`.")
    picture = picture_path(plot, vector, "report", force=force)
    check_capture(model, ray_address=capture.ray_address)
    found = report_probe(model, loaded, positive, negative, blocks=blocks, seed=seed, **capture.arguments)
    _print(found, {})
    _draw(found, picture)


def _print(found: ProbeReport, trained: Mapping[int, float]) -> None:
    """The table of all blocks, and warnings, on standard error. trained: block -> AUROC on the training prompts."""
    print_table(table_of(found, trained), stderr=True)
    kind = "held-out" if trained else "new"
    say(f"Measured on {found.num_positive} positive and {found.num_negative} negative {kind} prompts, at {found.at}.")
    for sentence in found.warnings():
        say(f"warning: {sentence}")


def table_of(found: ProbeReport, trained: Mapping[int, float]) -> Table:
    """Quality per block. trained: as of `_print`."""
    columns = ["train\nAUROC"] if trained else []
    names = ("AUROC", "95 %\ninterval", "thresh-\nold", "TPR", "FPR", "F1", "accu-\nracy", "ECE", "Brier", "")
    table = new_table("block", *columns, *names)
    for block, each in found.by_block.items():
        cells = [f"{trained[block]:.3f}"] if trained else []
        quality = each.quality
        rates = [""] * 4
        if quality is not None:
            numbers = (quality.recall, quality.false_positive_rate, quality.f1, quality.accuracy)
            rates = [f"{number:.3f}" for number in numbers]
        table.add_row(
            str(block),
            *cells,
            f"{each.auroc:.3f}",
            f"{each.low:.3f}-{each.high:.3f}",
            "" if each.probe.threshold is None else f"{each.probe.threshold:.4g}",
            *rates,
            *("" if number is None else f"{number:.3f}" for number in (each.calibration_error, each.brier)),
            "best" if block == found.best else "",
        )
    return table


def _draw(found: ProbeReport, picture: Path | None) -> None:
    if picture is not None:
        from steer_engine.evaluate.plots import probe
        from steer_engine.vectors.storage import write_atomically

        write_atomically(picture, probe(found, picture.suffix))
        say(f"{picture}: written")
