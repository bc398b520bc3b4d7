"""The figures of a report as one PNG, by matplotlib (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import import_module

from steer_engine.errors import VectorFileError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.report import Projections, block_cosines
from steer_engine.vectors.suggestion import doses
from steer_engine.vectors.svg import histogram_shares


def png_report(vectors: Mapping[str, ControlVector], projections: Mapping[str, Projections] | None = None) -> bytes:
    """One row of figures per vector: norms, doses, separation, cosines between blocks, and histograms of projections
    where there are any.

    Raises:
        VectorFileError: no vector, or matplotlib is not installed.
    """
    if not vectors:
        raise VectorFileError("A report needs at least one control vector.")
    try:
        # The object interface: no window system, no global state.
        figures = import_module("matplotlib.figure")
    except ImportError:
        raise VectorFileError("A PNG report needs: pip install 'steer-engine[report]'. HTML needs nothing.") from None
    columns = 4 + max((len(by_block) for by_block in (projections or {}).values()), default=0)
    figure = figures.Figure(figsize=(4 * columns, 3.2 * len(vectors)), layout="constrained")
    axes = figure.subplots(len(vectors), columns, squeeze=False)
    for row, (name, vector) in zip(axes, vectors.items(), strict=True):
        series = (("|v|", vector.norms), ("dose of scale 1", doses(vector)), ("AUROC", vector.metadata.separation))
        for axis, (title, values) in zip(row, series, strict=False):
            axis.bar(list(values), list(values.values()))
            axis.set_title(f"{name}: {title}", parse_math=False)
            axis.set_xlabel("block")
        if vector.metadata.separation:
            row[2].set_ylim(0.5, 1.0)
        row[3].imshow(block_cosines(vector), vmin=-1, vmax=1, cmap="RdBu")
        row[3].set_title("cosine between blocks")
        shown = (projections or {}).get(name, {})
        for axis, (block, sides) in zip(row[4:], shown.items(), strict=False):
            shares, edges = histogram_shares(*sides)
            for side, share_B, colour in zip(("positives", "negatives"), shares, ("C0", "C3"), strict=True):
                axis.stairs(share_B, edges, fill=True, alpha=0.55, color=colour, label=side)
            axis.set_title(f"projection at block {block}")
            axis.legend()
        for axis in row[4 + len(shown) :]:
            axis.set_axis_off()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
