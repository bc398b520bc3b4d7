"""Texts for the tests of derivation, and their residual stream by Hugging Face with hooks."""

from __future__ import annotations

from typing import Any

import numpy as np

from steer_engine.derive import Pair, Pairs
from steer_engine.derive.capture_config import CaptureConfig, Position

SMALL = (("dtype", "float32"), ("enforce_eager", True), ("max_model_len", 512), ("enable_prefix_caching", False))


def config(model: str, **settings: Any) -> CaptureConfig:
    return CaptureConfig(**{"model": model, "position": Position("last"), "engine_args": SMALL, **settings})


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def huggingface_rows(model: str, texts: list[str]) -> list[np.ndarray]:
    """Output of every block at every token, `[L, T, D]` float64 per text; hooks see it before the final norm."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    blocks: list[np.ndarray] = []
    for layer in reference.model.layers:
        layer.register_forward_hook(
            lambda _module, _args, out: blocks.append((out[0] if isinstance(out, tuple) else out)[0].double().numpy())
        )
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these matrices are small: on busy cores, threads that wait for each other are far slower
    try:
        with torch.no_grad():
            for text in texts:
                blocks.clear()
                reference.model(tokenizer(text, return_tensors="pt").input_ids)
                rows.append(np.stack(blocks))
    finally:
        torch.set_num_threads(threads)
    return rows


def top(rows: np.ndarray) -> np.ndarray:
    """Top right singular vector, or zeros where the first two singular values are too close to tell it apart."""
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    return vectors[0] if values[0] ** 2 > 1.1 * values[1] ** 2 else np.zeros_like(vectors[0])


REFERENCES = {
    "diffmean": lambda p, n: (p - n).mean(axis=0),
    "mean": lambda p, n: p.mean(axis=0),
    "mean_centred": lambda p, n: p.mean(axis=0) - n.mean(axis=0),
    "pca": lambda p, n: top(p - n),
    "pca_centred": lambda p, n: top(p - n - (p - n).mean(axis=0)),
}
"""Methods as NumPy in float64 computes them from positive and negative rows `[N, D]`; signs of PCA are open."""


def varied(count: int) -> Pairs:
    """Pairs of all lengths that a byte-level tokenizer makes long."""
    rng = np.random.default_rng(5)
    items = []
    for i in range(count):
        words = " ".join(rng.choice(["sun", "rain", "a", "window", "of", "my", "old"], size=int(rng.integers(1, 12))))
        items.append(Pair(positive=f"{words} good {i}", negative=f"{words} bad {i}", line=i + 1))
    return Pairs(tuple(items), "varied.jsonl")
