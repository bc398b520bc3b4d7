"""The PromQL of deploy/, and which metrics it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "steer-engine.json"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """All panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[tuple[str, str]]:
    """Title and PromQL of every query of the dashboard, with Grafana's variables filled in."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_of(query: str) -> set[str]:
    """Names of the series that a PromQL expression reads. Raises ValueError if it is not PromQL."""
    return set(_selected(promql_parser.parse(query)))


def _selected(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        assert node.name is not None
        yield node.name
        return
    if isinstance(node, promql_parser.Call):
        children = list(node.args)
    else:
        names = ("expr", "lhs", "rhs", "vector_selector", "param")
        children = [getattr(node, name) for name in names if getattr(node, name, None) is not None]
    for child in children:
        yield from _selected(child)
