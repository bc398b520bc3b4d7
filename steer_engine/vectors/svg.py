"""Small pictures as SVG text: bars by block, two histograms in one, a heat map. Numbers in, no text of a user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT, EDGE = 420, 200, 46
_BLUE, _RED = (33, 102, 172), (178, 24, 43)


def bars(values: Mapping[int, float], *, low: float = 0.0, high: float | None = None) -> str:
    """One bar per block; the axis runs from `low` to `high` (the largest value)."""
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
    """Shares of positives (blue) and negatives (red) per interval, each over its own number of texts."""
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
    """Share of each side in each of equal intervals over both, and the intervals' edges."""
    edges = np.histogram_bin_edges(np.concatenate([positive_N, negative_N]), bins=24)
    return [np.histogram(side_N, edges)[0] / max(1, len(side_N)) for side_N in (positive_N, negative_N)], edges


def heatmap(matrix: np.ndarray, labels: Sequence[int]) -> str:
    """A square of values from -1 (red) over 0 (white) to 1 (blue), with every tenth label or so."""
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
