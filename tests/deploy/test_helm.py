"""The chart, rendered by Helm's own library for every values file, against Kubernetes' schemas and our server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deploy.test_monitoring import our_series, vllm_series
from helm_python import Chart, HelmError, lint
from helpers.kubernetes import Manifest, validate
from helpers.monitoring import metrics_of

import steer_engine
from steer_engine.settings import ADMIN_KEY_FILE_ENV

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "steer-engine"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Kinds without a schema in Kubernetes itself."""


def values(name: str, **changes: Any) -> dict[str, Any]:
    """A values file, with some of its top-level keys updated."""
    found: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())
    for key, change in changes.items():
        found[key] = {**found.get(key, {}), **change} if isinstance(change, dict) else change
    return found


def render(given: dict[str, Any]) -> dict[str, Manifest]:
    """Kind -> object, of a release called `steered` in the namespace `serving`."""
    with Chart.load(str(CHART)) as chart:
        texts = chart.render(given, name="steered", namespace="serving")
    documents = [
        each for name, text in texts.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text) if each
    ]
    kinds = {document["kind"]: document for document in documents}
    assert len(kinds) == len(documents)
    return kinds


def server_of(deployment: Manifest) -> Manifest:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    found: Manifest = container
    return found


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_renders_valid_objects(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    serious = [message for message in lint(str(CHART), given, strict=True)["messages"] if message["severity"] > 1]
    assert serious == []
    kinds = render(given)
    assert {"Deployment", "Service", "NetworkPolicy", "ServiceAccount"} <= kinds.keys()
    for manifest in kinds.values():
        if manifest["apiVersion"] not in CUSTOM:
            validate(manifest)
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "steered"


def test_the_schemas_can_refuse() -> None:
    deployment = copy.deepcopy(render(values("one-gpu"))["Deployment"])
    server_of(deployment)["readinessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)


def test_every_template_is_rendered_by_some_values_file() -> None:
    kinds = {kind for path in VALUES for kind in render(yaml.safe_load(path.read_text()))}
    assert {"HorizontalPodAutoscaler", "ScaledObject", "ServiceMonitor", "PersistentVolumeClaim"} <= kinds
    assert {"PodDisruptionBudget", "ServiceAccount"} <= kinds


def test_selectors_meet_the_pods() -> None:
    kinds = render(values("tensor-parallel"))
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        kinds["Deployment"]["spec"]["selector"]["matchLabels"],
        kinds["Service"]["spec"]["selector"],
        kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels
    chosen = kinds["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert chosen <= kinds["Service"]["metadata"]["labels"].items()
    assert kinds["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == kinds["Service"]["spec"]["ports"][0]["name"]
    assert kinds["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == kinds["Deployment"]["metadata"]["name"]


def test_probes_and_grace_fit_the_drain() -> None:
    deployment = render(values("one-gpu", shutdown={"preStopSeconds": 7, "drainSeconds": 300}))["Deployment"]
    server, pod = server_of(deployment), deployment["spec"]["template"]["spec"]
    assert server["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert server["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert server["livenessProbe"]["httpGet"]["path"] == "/health", "a draining server is alive"
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert "--shutdown-timeout=300" in server["args"]
    assert pod["terminationGracePeriodSeconds"] >= 7 + 300 + 20
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800


def test_keys_come_from_secrets_and_never_by_argument() -> None:
    server = server_of(render(values("one-gpu"))["Deployment"])
    environment = {each["name"]: each for each in server["env"]}
    assert environment["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "steer-engine-keys", "key": "api-key"}
    folder, _, name = environment[ADMIN_KEY_FILE_ENV]["value"].rpartition("/")
    assert {"name": "admin-keys", "mountPath": folder, "readOnly": True} in server["volumeMounts"]
    assert name == "admin-keys"
    assert "key" not in " ".join(server["args"])
    with pytest.raises(HelmError, match="args"):
        render(values("one-gpu", args=["--api-key=abc"]))


def test_pods_are_confined() -> None:
    deployment = render(values("one-gpu"))["Deployment"]
    pod, server = deployment["spec"]["template"]["spec"], server_of(deployment)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"] for mount in server["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    paths = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert {"/vectors", "/cache", "/tmp", "/var/lib/steer", "/dev/shm"} <= paths
    assert server["image"] == f"steer-engine:{steer_engine.__version__}-cuda"


def test_the_network_policy_allows_the_named_sources() -> None:
    policy = render(values("tensor-parallel"))["NetworkPolicy"]["spec"]
    sources = [peer["namespaceSelector"]["matchLabels"] for peer in policy["ingress"][0]["from"]]
    assert [labels["kubernetes.io/metadata.name"] for labels in sources] == ["gateway", "monitoring"]
    own = render(values("one-gpu"))["NetworkPolicy"]["spec"]
    assert own["ingress"][0]["from"] == [{"podSelector": {}}]
    closed = render(values("mirror"))["NetworkPolicy"]["spec"]["egress"]
    assert [port["port"] for rule in closed for port in rule["ports"]] == [53, 53]


def test_scaling_reads_metrics_that_exist() -> None:
    triggers = render(values("tensor-parallel"))["ScaledObject"]["spec"]["triggers"]
    queries = [trigger["metadata"]["query"] for trigger in triggers]
    assert len(queries) == 2
    for query in queries:
        assert metrics_of(query) <= our_series() | vllm_series()
        assert query.count("{") == query.count('namespace="serving", service="steered"}')
    replicas = render(values("tensor-parallel"))["Deployment"]["spec"]
    assert "replicas" not in replicas, "the autoscaler sets it"


def test_registry_volume() -> None:
    claim = render(values("one-gpu"))["PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mirror = render(values("mirror"))
    assert "PersistentVolumeClaim" not in mirror
    (mount,) = [each for each in server_of(mirror["Deployment"])["volumeMounts"] if each["name"] == "vectors"]
    assert mount["readOnly"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": ""}, "model"),
        ({"replcias": 2}, "replcias"),
        ({"gpus": -1}, "gpus"),
        ({"shutdown": {"drainSeconds": 0}}, "drainSeconds"),
        ({"args": ["--shutdown-timeout=0"]}, "args"),
        ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "cannot both be enabled"),
        ({"replicas": 2, "registry": {"accessMode": "ReadWriteOnce"}}, "share one registry"),
        ({"registry": {"readOnly": True, "existingClaim": "v"}}, "cannot be changed"),
        ({"registry": {"readOnly": True}, "secrets": {"admin": ""}}, "must exist already"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(HelmError, match=reason):
        render(values("one-gpu", **changes))


def test_version_is_the_packages() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == steer_engine.__version__
