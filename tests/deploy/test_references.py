"""What the chart's objects, the KubeRay manifests and the alerts name exists: claims, Secrets, labels, ports, jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.chart import NAMESPACE, RELEASE, VALUES, objects, render, server_of, under, values
from helpers.kubernetes import Manifest
from helpers.monitoring import rules

from steer_engine.api.middleware import CARRYING_PATHS, INVOCATIONS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
BUILT_IN = {"v1", "apps/v1", "networking.k8s.io/v1", "policy/v1", "autoscaling/v2"}


def named(manifests: list[Manifest], kind: str) -> set[str]:
    return {each["metadata"]["name"] for each in manifests if each["kind"] == kind}


def claims(node: Any) -> set[str]:
    return set(under(node, "claimName"))


def secrets(node: Any) -> Iterator[str]:
    for key in ("secretKeyRef", "secretRef"):
        yield from (each["name"] for each in under(node, key))
    yield from under(node, "secretName")
    yield from under(node, "tlsSecret")


def given_by_the_operator(node: Any) -> set[str]:
    """All texts of a values file: an object that must exist already is named there."""
    if isinstance(node, dict):
        return set().union(*(given_by_the_operator(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(given_by_the_operator(value) for value in node))
    return {node} if isinstance(node, str) else set()


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_the_objects_of_a_release_fit_together(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    kinds, all_objects = render(given), objects(given)
    deployment, service = kinds["Deployment"], kinds["Service"]
    pod, server = deployment["spec"]["template"], server_of(deployment)
    existing = given_by_the_operator(given)

    assert claims(deployment) <= named(all_objects, "PersistentVolumeClaim") | existing
    assert named(all_objects, "PersistentVolumeClaim") <= claims(deployment), "a claim that no pod mounts"
    assert set(secrets(all_objects)) <= existing
    assert pod["spec"]["serviceAccountName"] in named(all_objects, "ServiceAccount") | existing
    mounts = [mount["name"] for mount in server["volumeMounts"]]
    assert sorted(mounts) == sorted(volume["name"] for volume in pod["spec"]["volumes"])

    ports = {port["name"] for port in server["ports"]}
    (front,) = service["spec"]["ports"]
    assert front["targetPort"] in ports
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        assert server[probe]["httpGet"]["port"] in ports
    for kind, key in (
        ("Deployment", "selector"),
        ("NetworkPolicy", "podSelector"),
        ("PodDisruptionBudget", "selector"),
    ):
        if kind in kinds:
            assert kinds[kind]["spec"][key]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for target in under(kinds.get(kind, {}), "scaleTargetRef"):
            assert target["name"] == deployment["metadata"]["name"]
    for backend in under(kinds.get("Ingress", {}), "backend"):
        assert backend["service"] == {"name": service["metadata"]["name"], "port": {"name": front["name"]}}
    for backends in under(kinds.get("HTTPRoute", {}), "backendRefs"):
        assert backends == [{"name": service["metadata"]["name"], "port": front["port"]}]


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_no_pod_waits_for_another_of_its_release(path: Path) -> None:
    """A claim for one node has one replica, which ends before its successor starts."""
    kinds = render(yaml.safe_load(path.read_text()))
    for claim in (kinds[name] for name in ("vectors", "cache") if name in kinds):
        if claim["spec"]["accessModes"] != ["ReadWriteMany"]:
            assert kinds["Deployment"]["spec"]["replicas"] == 1
            assert kinds["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("given", [values("one-node"), {"model": "Qwen/Qwen3-8B"}], ids=["one-node", "defaults"])
def test_a_plain_cluster_of_one_node_has_all_that_is_needed(given: dict[str, Any]) -> None:
    found = objects(given)
    assert {each["apiVersion"] for each in found} <= BUILT_IN, "an operator would have to be installed"
    assert not list(secrets(found))
    assert claims(found) == named(found, "PersistentVolumeClaim") == {f"{RELEASE}-vectors", f"{RELEASE}-cache"}
    for key in ("storageClassName", "runtimeClassName", "priorityClassName", "nodeSelector", "imagePullSecrets"):
        assert not list(under(found, key)), key
    pod = render(given)["Deployment"]["spec"]["template"]["spec"]
    assert "affinity" not in pod
    extended = {name for limits in under(pod, "limits") for name in limits if "/" in name}
    assert extended == (set() if given.get("gpus") == 0 else {"nvidia.com/gpu"})


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_the_manifests_for_kuberay_use_the_claims_of_the_chart(path: Path) -> None:
    """Rendered together: a job writes its vector into the volume that the servers read."""
    manifests = [each for each in yaml.safe_load_all(path.read_text()) if each]
    chart = objects(values("one-gpu"))
    assert claims(manifests)
    assert claims(manifests) <= named(chart, "PersistentVolumeClaim") | named(manifests, "PersistentVolumeClaim")
    if path.stem.startswith("rayjob"):
        mounted = {volume["name"]: volume for volumes in under(manifests, "volumes") for volume in volumes}
        of_server = {
            each["name"]: each
            for each in render(values("one-gpu"))["Deployment"]["spec"]["template"]["spec"]["volumes"]
        }
        for name in ("vectors", "cache"):
            assert (
                mounted[name]["persistentVolumeClaim"]["claimName"]
                == of_server[name]["persistentVolumeClaim"]["claimName"]
            )
    made = set(
        re.findall(r"kubectl create secret generic (\S+)", (DEPLOY / "README.md").read_text() + path.read_text())
    )
    assert set(secrets(manifests)) <= made, "no command says how to make it"


def test_alerts_meet_the_job_of_the_service_monitor() -> None:
    monitor = render(values("tensor-parallel"))["ServiceMonitor"]
    (endpoint,) = monitor["spec"]["endpoints"]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "job"
    job = relabeling["replacement"]
    # Each release has its own registry, and SteerEngineRegistriesDiffer compares all servers of a job.
    assert NAMESPACE in job
    assert RELEASE in job
    patterns = [found for rule in rules() for found in re.findall(r'job=~"([^"]*)"', rule["expr"])]
    assert patterns
    for pattern in patterns:
        assert re.fullmatch(pattern, job)  # Prometheus anchors its patterns
        assert re.fullmatch(pattern, "steer-engine"), "the job of deploy/prometheus/prometheus.yml"


def proxied() -> set[str]:
    """Exact paths that deploy/proxy/nginx.conf opens to clients."""
    return set(re.findall(r"location = (/v1/\S+)", (DEPLOY / "proxy" / "nginx.conf").read_text()))


def test_ingress_and_gateway_open_what_the_proxy_opens() -> None:
    (rule,) = render(values("openshift"))["Ingress"]["spec"]["rules"]
    paths = rule["http"]["paths"]
    assert {path["pathType"] for path in paths} == {"Exact"}
    assert {path["path"] for path in paths} == proxied()
    (route,) = render(values("tensor-parallel"))["HTTPRoute"]["spec"]["rules"]
    assert {match["path"]["value"] for match in route["matches"]} == proxied()
    assert {match["path"]["type"] for match in route["matches"]} == {"Exact"}
    assert len(route["matches"]) <= 8, "Gateway API 1.0 allows no more in a rule"
    assert CARRYING_PATHS - {INVOCATIONS, "/inference/v1/generate"} <= proxied()


def test_vectors_and_presets_are_opened_on_request_only() -> None:
    opened = {"/v1/steering/vectors", "/v1/steering/presets"}
    (rule,) = render(values("openshift", ingress={"registry": True}))["Ingress"]["spec"]["rules"]
    assert {path["path"] for path in rule["http"]["paths"] if path["pathType"] == "Prefix"} == opened
    _, route = render(values("tensor-parallel", gateway={"registry": True}))["HTTPRoute"]["spec"]["rules"]
    assert {match["path"]["value"] for match in route["matches"]} == opened
