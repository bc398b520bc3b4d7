"""The chart, rendered by Helm's own library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

from helpers.kubernetes import Manifest

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "steer-engine"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
RELEASE, NAMESPACE = "steered", "serving"
"""The release is called as in deploy/README.md, whose manifests for KubeRay use the names of its claims."""


def values(name: str, **changes: Any) -> dict[str, Any]:
    """A values file, with some of its top-level keys updated."""
    found: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())
    for key, change in changes.items():
        found[key] = {**found.get(key, {}), **change} if isinstance(change, dict) else change
    return found


def objects(given: dict[str, Any]) -> list[Manifest]:
    """All objects of the release."""
    with Chart.load(str(CHART)) as chart:
        texts = chart.render(given, name=RELEASE, namespace=NAMESPACE)
    return [each for name, text in texts.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text) if each]


def render(given: dict[str, Any]) -> dict[str, Manifest]:
    """Kind -> object; the claims are `vectors` and `cache`."""
    found = {}
    for each in objects(given):
        kind, name = each["kind"], each["metadata"]["name"]
        key = name.removeprefix(f"{RELEASE}-") if kind == "PersistentVolumeClaim" else kind
        assert key not in found, f"two objects {key}"
        found[key] = each
    return found


def server_of(deployment: Manifest) -> Manifest:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    found: Manifest = container
    return found


def under(node: Any, key: str) -> Iterator[Any]:
    """Every value that has this key, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from under(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from under(value, key)
