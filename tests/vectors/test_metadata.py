"""Checks of the metadata fields."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from steer_engine.errors import VectorFileError
from steer_engine.vectors import VectorMetadata


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"unknown": 1}, "unknown"),
        ({"model": 3}, "model"),
        ({"model": "m" * 1025}, "model"),
        ({"notes": "n" * 16385}, "notes"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_blocks": 1025}, "num_blocks"),
        ({"residual_norms": {-1: 1.0}}, "residual_norms"),
        ({"residual_norms": {1024: 1.0}}, "residual_norms"),
        ({"residual_norms": {1: 0.0}}, "residual_norms"),
        ({"residual_norms": {1: float("nan")}}, "residual_norms"),
        ({"residual_norms": {1: float("inf")}}, "residual_norms"),
        ({"residual_norms": {1: "2"}}, "residual_norms"),
        ({"separation": {1: 1.5}}, "separation"),
        ({"explained_variance": {1: -0.1}}, "explained_variance"),
        ({"separation": {1: float("nan")}}, "separation"),
        ({"dataset_digest": "sha256:00"}, "dataset_digest"),
        ({"dataset_digest": "sha256:" + "a" * 64 + "\n"}, "dataset_digest"),
        ({"created_with": {str(i): "" for i in range(65)}}, "created_with"),
        ({"extra": {"": "x"}}, "extra"),
        ({"extra": {"k": "\ud800"}}, "extra"),
    ],
)
def test_errors_name_the_unusable_field(fields: dict[str, object], where: str) -> None:
    with pytest.raises(VectorFileError, match=f"metadata field '{where}"):
        VectorMetadata.checked(fields)


def test_it_is_frozen_and_residual_norms_are_sorted() -> None:
    metadata = VectorMetadata(residual_norms={5: 1.0, 2: 3.0})
    assert list(metadata.residual_norms) == [2, 5]
    with pytest.raises(ValidationError):
        metadata.model = "other"  # type: ignore[misc]
