"""The HTML report about control vectors and row sets: one page with tables and SVG figures, without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from steer_engine.errors import VectorFileError
from steer_engine.site import Site
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.row_set import RowSet
from steer_engine.vectors.suggestion import doses, suggest

Projections = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""Block -> projections of positive and negative texts on the direction there, `[N]` each."""

WIDTH, HEIGHT, EDGE = 420, 200, 46
"""Size of a figure and width of its axis labels, in pixels."""

_BLUE, _RED = (33, 102, 172), (178, 24, 43)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } figure { display: inline-block; margin: .5rem }
figcaption { font-weight: 600 } dt { float: left; width: 9rem; color: #666 } code { font-size: .9em }
"""


def html_report(vectors: Mapping[str, AnyVector], projections: Mapping[str, Projections] | None = None) -> str:
    """The page: norms, dose and separation by block, cosines between blocks and between several vectors.

    All text from a file is escaped.

    projections: vector's name -> projections of texts on it, shown as histograms.

    Raises:
        VectorFileError: no vector is given, or the vectors have different hidden sizes.
    """
    if not vectors:
        raise VectorFileError("A report needs at least one control vector.")
    directions = {name: vector for name, vector in vectors.items() if isinstance(vector, ControlVector)}
    parts = [_section(name, vector, (projections or {}).get(name, {})) for name, vector in directions.items()]
    parts += [_rows_section(name, rows) for name, rows in vectors.items() if isinstance(rows, RowSet)]
    if len(directions) > 1:
        parts.append(_between(directions))
    title = ", ".join(map(escape, vectors))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f"<h1>Control vectors</h1>\n{''.join(parts)}</html>\n"
    )


def block_cosines(vector: ControlVector) -> np.ndarray:
    """Cosines between the directions of all pairs of blocks, `[blocks, blocks]`; 0 for a direction of zeros."""
    rows = np.stack([direction.astype(np.float64) for direction in vector.directions.values()])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    cosines: np.ndarray = units @ units.T
    return cosines


def cosine_by_block(a: ControlVector, b: ControlVector) -> dict[int, float]:
    """Block -> cosine between the directions of two vectors, where both have one. Raises VectorFileError."""
    if a.hidden_size != b.hidden_size:
        raise VectorFileError(f"Vectors of hidden size {a.hidden_size} and {b.hidden_size} cannot be compared.")
    found = {}
    for block in sorted(set(a.blocks) & set(b.blocks)):
        left, right = a.directions[block].astype(np.float64), b.directions[block].astype(np.float64)
        size = float(np.linalg.norm(left) * np.linalg.norm(right))
        found[block] = float(left @ right) / size if size > 0 else 0.0
    return found


def _section(name: str, vector: ControlVector, projections: Projections) -> str:
    about = vector.metadata
    try:
        suggestion = str(suggest(vector))
    except VectorFileError as error:
        suggestion = error.message
    facts = {
        "digest": vector.digest,
        "model": about.model,
        "method": about.method,
        "position": about.position,
        "site": "" if about.site is Site.BLOCK else about.site.value,
        "data set": about.dataset_digest,
        "condition": "" if about.condition is None else str(about.condition),
        "probe": "" if about.probe is None else str(about.probe),
        "made with": ", ".join(f"{key} {value}" for key, value in about.created_with.items()),
        "notes": about.notes,
        "suggestion": suggestion,
    }
    listed = _listed(facts)
    figures = [_figure("|v|", bars(vector.norms))]
    if dose := doses(vector):
        figures.append(_figure("dose of scale 1: |v| / |x|", bars(dose)))
    if about.separation:
        figures.append(_figure("held-out AUROC (0.5 is chance)", bars(about.separation, low=0.5, high=1.0)))
    figures.append(_figure("cosine between blocks", heatmap(block_cosines(vector), vector.blocks)))
    for block, sides in projections.items():
        figures.append(_figure(f"projection of texts at block {block}", histograms(*sides)))
    return f"<h2>{escape(name)}</h2><dl>{listed}</dl>{''.join(figures)}{_table(vector)}\n"


def _rows_section(name: str, rows: RowSet) -> str:
    about = rows.metadata
    facts = {
        "digest": rows.digest,
        "kind": rows.kind,
        "model": about.model,
        "method": about.method,
        "notes": about.notes,
    }
    skew = {block: rows.orthonormality_error(block) for block in rows.blocks}
    figure = _figure("deviation of R from orthonormal", bars(skew)) if rows.kind == "low_rank" else ""
    return f"<h2>{escape(name)}</h2><dl>{_listed(facts)}</dl>{figure}{_grid(*row_figures(rows))}\n"


def row_figures(rows: RowSet) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table with one line per row: its label, the norms of both rows, and the angle between."""
    lines = []
    for block in rows.blocks:
        for number in rows.numbers(block):
            row = rows.row(block, number)
            read, write = row.read.astype(np.float64), row.write.astype(np.float64)
            norms = float(np.linalg.norm(read)), float(np.linalg.norm(write))
            cosine = float(read @ write) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
            threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
            numbers = [f"{norms[0]:.4g}", f"{norms[1]:.4g}", f"{cosine:.3f}", f"{row.bias:.4g}", threshold]
            lines.append([str(block), str(number), *numbers, row.label])
    name = "feature" if rows.kind == "features" else "row"
    return ["block", name, "|read|", "|write|", "cosine", "bias", "threshold", "label"], lines


def _listed(facts: Mapping[str, str]) -> str:
    return "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)


def _table(vector: ControlVector) -> str:
    about = vector.metadata
    columns = (vector.norms, about.residual_norms, doses(vector), about.separation, about.explained_variance)
    forms = ("{:.4g}", "{:.4g}", "{:.1%}", "{:.3f}", "{:.1%}")
    rows = [
        [str(block), *(form.format(by[block]) if block in by else "" for by, form in zip(columns, forms, strict=True))]
        for block in vector.blocks
    ]
    return _grid(["block", "|v|", "mean |x|", "dose at scale 1", "held-out AUROC", "explained variance"], rows)


def _between(vectors: Mapping[str, ControlVector]) -> str:
    names = list(vectors)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    columns = [cosine_by_block(vectors[a], vectors[b]) for a, b in pairs]
    blocks = sorted(set().union(*columns)) if columns else []
    heads = ["block", *(f"{a} · {b}" for a, b in pairs)]
    rows = [[str(block), *(f"{c[block]:.3f}" if block in c else "" for c in columns)] for block in blocks]
    return f"<h2>Cosine between vectors</h2>{_grid(heads, rows)}"


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def bars(values: Mapping[int, float], *, low: float = 0.0, high: float | None = None) -> str:
    """One bar per block. The axis ranges from `low` to `high` (default: the largest value)."""
    top = max(values.values(), default=0.0) if high is None else high
    span = top - low if top > low else 1.0
    step = (WIDTH - EDGE) / max(1, len(values))
    parts = []
    for i, (block, value) in enumerate(values.items()):
        height = (HEIGHT - EDGE) * min(1.0, max(0.0, (value - low) / span))
        x, y = EDGE + i * step, HEIGHT - 24 - height
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" height="{height:.1f}" fill="#2166ac">'
            f"<title>block {block}: {value:.4g}</title></rect>"
        )
        if i % max(1, len(values) // 10) == 0:
            parts.append(_text(x + step * 0.4, HEIGHT - 8, str(block), "middle"))
    parts += [_text(EDGE - 6, HEIGHT - 22, f"{low:.3g}", "end"), _text(EDGE - 6, 28, f"{low + span:.3g}", "end")]
    return _picture(WIDTH, HEIGHT, parts)


def histograms(positive_N: np.ndarray, negative_N: np.ndarray) -> str:
    """Histograms of positives (blue) and negatives (red), each normalised by its own number of texts."""
    shares, edges = histogram_shares(positive_N, negative_N)
    top = max(float(share.max()) for share in shares) or 1.0
    step = (WIDTH - EDGE) / (len(edges) - 1)
    parts = []
    for name, share_B, colour in zip(("positives", "negatives"), shares, (_BLUE, _RED), strict=True):
        for i, share in enumerate(share_B):
            height = (HEIGHT - EDGE) * float(share) / top
            parts.append(
                f'<rect x="{EDGE + i * step:.1f}" y="{HEIGHT - 24 - height:.1f}" width="{step:.1f}" '
                f'height="{height:.1f}" fill="rgb{colour}" fill-opacity="0.55">'
                f"<title>{name} from {edges[i]:.4g} to {edges[i + 1]:.4g}: {share:.1%}</title></rect>"
            )
        place = EDGE if name == "negatives" else WIDTH - 60
        parts.append(f'<text x="{place}" y="14" font-size="11" fill="rgb{colour}">{name}</text>')
    for i in range(0, len(edges), max(1, (len(edges) - 1) // 4)):
        parts.append(_text(EDGE + i * step, HEIGHT - 8, f"{edges[i]:.3g}", "end" if i == len(edges) - 1 else "middle"))
    parts += [_text(EDGE - 6, HEIGHT - 22, "0", "end"), _text(EDGE - 6, 28, f"{top:.0%}", "end")]
    return _picture(WIDTH, HEIGHT, parts)


def histogram_shares(positive_N: np.ndarray, negative_N: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Shares of positives and of negatives in 24 equal intervals `[24]`, and the edges of these `[25]`."""
    edges = np.histogram_bin_edges(np.concatenate([positive_N, negative_N]), bins=24)
    return [np.histogram(side_N, edges)[0] / max(1, len(side_N)) for side_N in (positive_N, negative_N)], edges


def heatmap(matrix: np.ndarray, labels: Sequence[int]) -> str:
    """A square of values from -1 (red) through 0 (white) to 1 (blue), with about six labels per axis."""
    count = len(labels)
    step = (HEIGHT - 24) / max(1, count)
    parts = []
    for row in range(count):
        for column in range(count):
            value = float(matrix[row, column])
            parts.append(
                f'<rect x="{24 + column * step:.2f}" y="{row * step:.2f}" width="{step + 0.05:.2f}" '
                f'height="{step + 0.05:.2f}" fill="{_colour(value)}">'
                f"<title>{labels[row]}, {labels[column]}: {value:.3f}</title></rect>"
            )
        if row % max(1, count // 6) == 0:
            parts.append(_text(20, row * step + step / 2 + 4, str(labels[row]), "end"))
            parts.append(_text(24 + row * step + step / 2, HEIGHT - 8, str(labels[row]), "middle"))
    return _picture(HEIGHT, HEIGHT, parts)


def _colour(value: float) -> str:
    end = _BLUE if value >= 0 else _RED
    share = min(1.0, abs(value))
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in end)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="#555" text-anchor="{anchor}">{text}</text>'


def _picture(width: int, height: int, parts: Sequence[str]) -> str:
    return f'<svg width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'
