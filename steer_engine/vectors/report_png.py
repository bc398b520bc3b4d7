"""The figures of a report as one PNG, by matplotlib (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import import_module

from steer_engine.errors import VectorFileError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.report import block_cosines
from steer_engine.vectors.suggestion import doses


def png_report(vectors: Mapping[str, ControlVector]) -> bytes:
    """One row of four figures per vector: norms, doses, separation, cosines between blocks.

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
    figure = figures.Figure(figsize=(16, 3.2 * len(vectors)), layout="constrained")
    axes = figure.subplots(len(vectors), 4, squeeze=False)
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
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
