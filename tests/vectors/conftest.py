"""Sample vectors."""

from __future__ import annotations

import numpy as np
import pytest

from steer_engine.probe import Platt
from steer_engine.vectors import ControlVector, VectorMetadata
from steer_engine.vectors.metadata import FittedCondition, FittedProbe, ProbeBlock


@pytest.fixture
def vector() -> ControlVector:
    """Blocks 2, 3 and 7 of a model with 12 blocks and hidden size 6, fully described."""
    rng = np.random.default_rng(7)
    return ControlVector(
        directions={block: rng.normal(size=6).astype(np.float32) for block in (7, 2, 3)},
        metadata=VectorMetadata(
            model="example/tiny",
            architecture="LlamaForCausalLM",
            num_blocks=12,
            method="diffmean",
            position="last",
            residual_norms={2: 10.5, 3: 11.25, 7: 0.1},
            separation={3: 0.75, 2: 1.0},
            explained_variance={7: 0.25, 3: 0.5},
            condition=FittedCondition(
                blocks=(2, 7),
                measure="cosine",
                at="mean_prompt",
                above=0.125,
                f1=0.9,
                precision=1.0,
                recall=0.8,
                accuracy=0.85,
                auroc=0.97,
                held_out={"positive": 12, "negative": 13},
                chat=True,
            ),
            probe=FittedProbe(
                blocks={
                    3: ProbeBlock(
                        auroc=0.97,
                        threshold=1.5,
                        true_positive_rate=0.75,
                        false_positive_rate=0.0,
                        platt=Platt(2.0, -1.25),
                    ),
                    7: ProbeBlock(threshold=-2.0),
                },
                at="every_prompt_token",
                target_false_positive_rate=0.01,
                held_out={"positive": 12, "negative": 13},
                chat=True,
            ),
            dataset_digest="sha256:" + "ab" * 32,
            created_with={"steer-engine": "0.1.0"},
            notes="A sample with an umlaut: ü.",
            extra={"author": "someone"},
        ),
    )
