"""Dumps of given rows, made without an engine by the writer that engines use."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from steer_engine.derive.capture_engine import CapturedText
from steer_engine.derive.dump_folder import DumpFolder, DumpManifest
from steer_engine.derive.texts import Text

BLOCKS = [4, 9]


def manifest(num_texts: int, hidden_size: int, **settings: Any) -> DumpManifest:
    fields = {
        "model": "org/model",
        "weights": "sha256:" + "0" * 64,
        "architecture": "LlamaForCausalLM",
        "hidden_size": hidden_size,
        "num_blocks": 12,
        "blocks": BLOCKS,
        "dtype": "float32",
        "stored": "float32",
        "position": "last",
        "chat": False,
        "dataset": "sha256:" + "1" * 64,
        "source": "pairs.jsonl",
        "num_texts": num_texts,
        "paired": True,
        "versions": {"vllm": "1"},
    }
    return DumpManifest.model_validate(fields | settings)


def texts_of(num_texts: int, *, paired: bool = True, labels: tuple[str, str] = ("positive", "negative")) -> list[Text]:
    return [
        Text(id=f"t{i}", text="x", label=labels[i % 2], pair=str(i // 2) if paired else "", line=i + 1)
        for i in range(num_texts)
    ]


def write(
    path: Path, rows_NLD: np.ndarray, *, cuts: tuple[int, ...] = (), texts: list[Text] | None = None, **settings: Any
) -> DumpFolder:
    """A dump of one row per text `[N, L, D]`, in shards that begin at 0 and at `cuts`."""
    texts = texts or texts_of(len(rows_NLD))
    folder = DumpFolder.start(path, manifest(len(rows_NLD), rows_NLD.shape[2], **settings))
    edges = (0, *cuts, len(rows_NLD))
    with folder.writing():
        for begin, end in itertools.pairwise(edges):
            folder.write(begin, texts[begin:end], [rows_of(row_LD) for row_LD in rows_NLD[begin:end]])
    return folder


def rows_of(row_LD: np.ndarray) -> CapturedText:
    return CapturedText(
        rows_LPD=row_LD[:, None].astype(np.float32),
        norm_L=np.linalg.norm(row_LD.astype(np.float64), axis=1),
        norm_count=1,
        num_tokens=7,
        tokens_digest="sha256:" + "2" * 64,
    )


def contrast(num_pairs: int = 40, hidden_size: int = 8, seed: int = 3) -> np.ndarray:
    """Rows `[2 * pairs, 2, D]` in float32, positives at even places, apart along one direction per block."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(num_pairs, 2, hidden_size))
    gap = rng.normal(size=(2, hidden_size)) * (1 + 0.3 * rng.normal(size=(num_pairs, 1, 1)))
    rows = np.empty((2 * num_pairs, 2, hidden_size), dtype=np.float32)
    rows[::2], rows[1::2] = base + gap + 0.3 * rng.normal(size=base.shape), base
    return rows
