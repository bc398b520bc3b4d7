"""Everyday beginnings of sentences: what steering does to text that it is not meant for."""

from __future__ import annotations

from importlib import resources


def neutral_texts() -> list[str]:
    """The packaged texts, one a line; each breaks off where a next word is due."""
    data = resources.files("steer_engine.evaluate").joinpath("data/neutral.txt").read_text(encoding="utf-8")
    return [line for line in data.splitlines() if line.strip()]
