"""The costs of real registries of two sizes."""

from __future__ import annotations

import pytest
from registry_costs import registry_costs


def test_costs_grow_with_the_manifest_only() -> None:
    few, more = registry_costs(50), registry_costs(500)
    assert few["stats_per_edit"] == more["stats_per_edit"] == 1, "the manifest, once per steered request"
    assert few["stats_per_poll"] == more["stats_per_poll"], "for any number of uploaded vectors"
    assert few["stats_per_poll_and_file"] == 2, "each file of the folder is checked, under both suffixes"
    assert more["manifest_bytes"] == pytest.approx(10 * few["manifest_bytes"], rel=0.1)
