"""A page about one or several control vectors: one HTML file without scripts or anything from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from steer_engine.errors import VectorFileError
from steer_engine.vectors import svg
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.suggestion import doses, suggest

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } figure { display: inline-block; margin: .5rem }
figcaption { font-weight: 600 } dt { float: left; width: 9rem; color: #666 } code { font-size: .9em }
"""


Projections = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""Block -> components of positives and negatives along the direction there, `[N]` each."""


def html_report(vectors: Mapping[str, ControlVector], projections: Mapping[str, Projections] | None = None) -> str:
    """The page: norms, dose and separation by block, cosines between blocks, and between vectors where there are more.

    projections: vector's name -> where texts lie along it, shown as histograms.

    Everything that comes from a file is escaped.
    """
    if not vectors:
        raise VectorFileError("A report needs at least one control vector.")
    parts = [_section(name, vector, (projections or {}).get(name, {})) for name, vector in vectors.items()]
    if len(vectors) > 1:
        parts.append(_between(vectors))
    title = ", ".join(map(escape, vectors))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f"<h1>Control vectors</h1>\n{''.join(parts)}</html>\n"
    )


def block_cosines(vector: ControlVector) -> np.ndarray:
    """Cosines between the directions of all pairs of blocks, `[blocks, blocks]`; zero directions have cosine 0."""
    rows = np.stack([direction.astype(np.float64) for direction in vector.directions.values()])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    cosines: np.ndarray = units @ units.T
    return cosines


def cosine_by_block(a: ControlVector, b: ControlVector) -> dict[int, float]:
    """Cosine between two vectors at each block that both have."""
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
        "data set": about.dataset_digest,
        "made with": ", ".join(f"{key} {value}" for key, value in about.created_with.items()),
        "notes": about.notes,
        "to start with": suggestion,
    }
    listed = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
    figures = [_figure("|v|", svg.bars(vector.norms))]
    if dose := doses(vector):
        figures.append(_figure("dose of scale 1: |v| / |x|", svg.bars(dose)))
    if about.separation:
        figures.append(_figure("held-out AUROC (0.5 is chance)", svg.bars(about.separation, low=0.5, high=1.0)))
    figures.append(_figure("cosine between blocks", svg.heatmap(block_cosines(vector), vector.blocks)))
    for block, sides in projections.items():
        figures.append(_figure(f"projection of texts at block {block}", svg.histograms(*sides)))
    return f"<h2>{escape(name)}</h2><dl>{listed}</dl>{''.join(figures)}{_table(vector)}\n"


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
