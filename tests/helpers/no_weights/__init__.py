"""A model folder without weights: what needs no engine accepts it, and an engine that starts with it fails."""

from pathlib import Path

NO_WEIGHTS = str(Path(__file__).parent)
