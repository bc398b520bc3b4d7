"""The costs of a registry, on real ones of two sizes."""

from __future__ import annotations

import pytest
from registry_costs import registry_costs


def test_what_a_registry_is_asked() -> None:
    few, more = registry_costs(50), registry_costs(500)
    assert few["stats_per_edit"] == more["stats_per_edit"] == 1, "the manifest, before each steered request"
    assert few["stats_per_poll"] == more["stats_per_poll"], "however many vectors the shelf has"
    assert few["stats_per_poll_and_file"] == 2, "files of the folder are looked at one by one, under both suffixes"
    assert more["manifest_bytes"] == pytest.approx(10 * few["manifest_bytes"], rel=0.1)
