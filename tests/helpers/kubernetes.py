"""Manifests, and what Kubernetes' own schemas say of them."""

from __future__ import annotations

from typing import Any

import kubernetes_validate

Manifest = dict[str, Any]

KUBERNETES = ("1.29", "1.37")
"""The oldest that the chart says it is for, and the newest that the package of schemas knows."""


def validate(manifest: Manifest) -> None:
    """Raises kubernetes_validate.ValidationError; unknown fields are errors."""
    for version in KUBERNETES:
        kubernetes_validate.validate(manifest, version, strict=True)


def validate_pod(template: Manifest) -> None:
    """A pod template inside another kind of object."""
    metadata = {"name": "checked", **template.get("metadata", {})}
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


def quantity(text: str) -> float:
    """Bytes of `16Gi`."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(text[:-2]) * units[text[-2:]] if text[-2:] in units else float(text)
