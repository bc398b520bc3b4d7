"""Dashboard, rules and scrape configuration are valid and use metrics that exist."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from helpers.monitoring import PROMETHEUS, dashboard, metrics_of, panel_queries, panels, rules
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from steer_engine.api import metrics

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OF_PROMETHEUS = {"up"}


def series(name: str, kind: str) -> set[str]:
    """Names on /metrics of a metric that Python calls `name`."""
    return {name.removesuffix("_total") + suffix for suffix in SUFFIXES[kind]}


@functools.cache
def our_series() -> set[str]:
    ours = [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]
    families = [family for metric in ours for family in metric.describe()]
    return {name for family in families for name in series(family.name, family.type)}


@functools.cache
def vllm_series() -> set[str]:
    """From vLLM's source, since importing it takes as long as all tests here. tests/servers checks a running server."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    found = re.findall(r"self\._(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"", source)
    return {name for kind, metric in found for name in series(metric, kind)}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def test_the_names_are_those_of_the_code() -> None:
    assert "steer_engine_requests_total" in our_series()
    assert "steer_engine_admission_seconds_bucket" in our_series()
    assert "vllm:num_requests_waiting" in vllm_series()
    assert len(vllm_series()) > 40


@pytest.mark.parametrize(("title", "query"), list(panel_queries()))
def test_panels_read_metrics_that_exist(title: str, query: str) -> None:
    assert metrics_of(query) <= our_series() | vllm_series(), title


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_read_metrics_that_exist(rule: dict[str, str]) -> None:
    assert metrics_of(rule["expr"]) <= our_series() | vllm_series() | recorded() | OF_PROMETHEUS


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    """A metric that is not on the dashboard is not seen."""
    shown = {name for _, query in panel_queries() for name in metrics_of(query)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in our_series()}
    assert families - {re.sub(r"_bucket$", "", name) for name in shown} == set()


def differences(given: Any, known: Any, place: str = "") -> Iterator[str]:
    """Places where `known` lacks a part of `given`, or differs from it."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            yield from differences(value, known[key], f"{place}.{key}") if key in known else [f"{place}.{key}"]
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif given != known:
        yield f"{place}: {given!r} is {known!r}"


def parsed_by_grafana(board: dict[str, Any]) -> Any:
    """The dashboard after a round trip through Grafana's generated types. Unknown fields are lost."""
    register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))


def test_dashboard_passes_the_schema_of_grafana() -> None:
    board = dashboard()
    assert list(differences(board, parsed_by_grafana(board))) == []


@pytest.mark.parametrize("place", ["", "panels.3", "panels.3.fieldConfig.defaults", "panels.3.targets.0"])
def test_the_schema_finds_unknown_fields(place: str) -> None:
    board = spoiled = dashboard()
    for key in filter(None, place.split(".")):
        spoiled = spoiled[int(key) if key.isdigit() else key]
    spoiled["heigth"] = 8
    found = list(differences(board, parsed_by_grafana(board)))
    assert len(found) == 1
    assert found[0].endswith(".heigth")


def test_the_dashboard_is_consistent() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            used = {name for name in re.findall(r"\$(\w+)", target["expr"]) if not name.startswith("__")}
            assert used == {"instance"} <= variables
            assert target["datasource"] == panel["datasource"]
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_every_alert_says_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"].endswith(".")


def test_every_rule_has_unit_tests() -> None:
    """Each alert is raised in one test and not in another; each recording rule has a value."""
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    checks = [check for test in tests for check in test.get("alert_rule_test", ())]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == alerts
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == alerts
    evaluated = [check["expr"] for test in tests for check in test.get("promql_expr_test", ())]
    assert {name for expr in evaluated for name in metrics_of(expr)} >= recorded()


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


@needs_promtool
def test_our_metrics_are_what_prometheus_recommends() -> None:
    """Names, units and help texts, by Prometheus' own linter."""
    registry = CollectorRegistry()
    for metric in (each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)):
        registry.register(metric)
    page = generate_latest(registry)
    assert page.count(b"# HELP steer_engine_") > 10
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@needs_promtool
def test_promtool_finds_an_alert_that_does_not_fire(tmp_path: Path) -> None:
    for name in ("rules.yml", "rules_test.yml"):
        shutil.copy(PROMETHEUS / name, tmp_path / name)
    rules_file = tmp_path / "rules.yml"
    rules_file.write_text(rules_file.read_text().replace("steer_engine_armed == 0", "steer_engine_armed == 2"))
    command = ["promtool", "test", "rules", "rules_test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SteerEngineNotArmed" in done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
)
def test_promtool(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
