"""The chart, rendered by Helm's own library for every values file, against Kubernetes' schemas and our server."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deploy.test_monitoring import our_series, vllm_series
from helm_python import HelmError, lint
from helpers.chart import CHART, VALUES, render, server_of, values
from helpers.kubernetes import validate
from helpers.monitoring import DASHBOARD, PROMETHEUS, metrics_of

import steer_engine
from steer_engine.monitor import MonitorSpec
from steer_engine.settings import ADMIN_KEY_FILE_ENV

CUSTOM = {"gateway.networking.k8s.io/v1", "keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Kinds without a schema in Kubernetes itself."""


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
    assert {"HorizontalPodAutoscaler", "ScaledObject", "ServiceMonitor", "vectors", "cache"} <= kinds
    assert {"PodDisruptionBudget", "ServiceAccount", "Ingress", "HTTPRoute", "PrometheusRule", "ConfigMap"} <= kinds


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


def test_one_replica_gets_claims_that_any_cluster_has_and_frees_its_gpu_first() -> None:
    one = render(values("one-gpu"))
    assert one["vectors"]["spec"]["accessModes"] == one["cache"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert one["vectors"]["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert one["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


def test_several_replicas_share_the_registry_and_are_replaced_one_by_one() -> None:
    two = render(values("one-gpu", replicas=2))
    assert two["vectors"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "cache" not in two, "a volume for one node would keep the second pod waiting"
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert two["Deployment"]["spec"]["strategy"] == rolling
    shared = render(values("one-gpu", replicas=2, cache={"accessMode": "ReadWriteMany"}))
    assert shared["cache"]["spec"]["accessModes"] == ["ReadWriteMany"]
    no_spare = render(values("follower"))["Deployment"]["spec"]["strategy"]
    assert no_spare["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def volumes_of(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pod = render(given)["Deployment"]["spec"]["template"]["spec"]
    return {volume.pop("name"): volume for volume in pod["volumes"]}


def test_without_a_claim_each_pod_has_its_own_folder() -> None:
    given = values("one-gpu", registry={"create": False}, cache={"create": False})
    assert not {"vectors", "cache"} & render(given).keys()
    volumes = volumes_of(given)
    assert volumes["vectors"] == {"emptyDir": {"sizeLimit": "20Gi"}}
    assert volumes["cache"] == {"emptyDir": {"sizeLimit": "100Gi"}}


def test_a_read_only_registry() -> None:
    mirror = render(values("mirror"))
    assert "vectors" not in mirror
    (mount,) = [each for each in server_of(mirror["Deployment"])["volumeMounts"] if each["name"] == "vectors"]
    assert mount["readOnly"]


def test_a_mirror_follows_a_url_with_credentials_from_a_secret() -> None:
    follower = render(values("follower"))
    server = server_of(follower["Deployment"])
    assert {"--steering-mirror=s3://bucket/vectors", "--steering-mirror-seconds=30"} <= set(server["args"])
    assert server["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
    assert "vectors" not in follower
    assert "emptyDir" in volumes_of(values("follower"))["vectors"]


def test_openshift_chooses_the_ids() -> None:
    deployment = render(values("openshift"))["Deployment"]
    pod, server = deployment["spec"]["template"]["spec"], server_of(deployment)
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["runtimeClassName"] == "nvidia"
    assert server["securityContext"]["readOnlyRootFilesystem"]
    home = {each["name"]: each.get("value") for each in server["env"]}["HOME"]
    assert home in [mount["mountPath"] for mount in server["volumeMounts"]], "nothing else is writable for any user id"


def test_a_replica_without_gpus_runs_the_image_for_cpus() -> None:
    server = server_of(render(values("one-node"))["Deployment"])
    assert server["image"] == f"steer-engine:{steer_engine.__version__}-cpu"
    assert not [name for name in server["resources"]["limits"] if "/" in name]


def test_rules_and_dashboard_are_those_of_the_other_folders() -> None:
    kinds = render(values("tensor-parallel"))
    assert kinds["PrometheusRule"]["spec"] == yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    assert json.loads(kinds["ConfigMap"]["data"]["steer-engine.json"]) == json.loads(DASHBOARD.read_text())
    assert kinds["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert kinds["PrometheusRule"]["metadata"]["labels"]["release"] == "prometheus"


def test_the_adapter_has_the_metric_of_the_autoscaler() -> None:
    (rule,) = yaml.safe_load((PROMETHEUS / "adapter.yml").read_text())["rules"]["custom"]
    (metric,) = render(values("mirror"))["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    series = rule["seriesQuery"]
    assert metrics_of(series) <= vllm_series()
    # As the adapter fills it in for the pods of a HorizontalPodAutoscaler.
    filled = {"<<.Series>>": series.split("{")[0], "<<.LabelMatchers>>": 'pod=~"a|b"', "<<.GroupBy>>": "pod"}
    query = rule["metricsQuery"]
    for name, text in filled.items():
        assert name in query
        query = query.replace(name, text)
    assert metrics_of(query) == metrics_of(series)
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}


def test_monitors_become_flags() -> None:
    monitors = ["mood", "toxic=toxicity:14-16:cosine:above=-0.2"]
    args = server_of(render(values("one-gpu", monitors=monitors))["Deployment"])["args"]
    flags = [arg.removeprefix("--steering-monitor=") for arg in args if arg.startswith("--steering-monitor=")]
    assert flags == monitors
    assert [MonitorSpec.parse(flag).name for flag in flags] == ["mood", "toxic"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": ""}, "model"),
        ({"replcias": 2}, "replcias"),
        ({"gpus": -1}, "gpus"),
        ({"shutdown": {"drainSeconds": 0}}, "drainSeconds"),
        ({"args": ["--shutdown-timeout=0"]}, "args"),
        ({"args": ["--steering-monitor=mood"]}, "args"),
        ({"monitors": ["mood above 0.5"]}, "monitors"),
        ({"monitors": ["mood", "mood"]}, "monitors"),
        ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "cannot both be enabled"),
        ({"replicas": 2, "registry": {"accessMode": "ReadWriteOnce"}}, "share one registry"),
        ({"replicas": 2, "registry": {"create": False}}, "would reach one replica only"),
        ({"replicas": 2, "registry": {"mirror": {"url": "s3://b/v"}}}, "would reach one replica only"),
        ({"registry": {"accessMode": "ReadWriteOncePod"}, "updateStrategy": {"type": "RollingUpdate"}}, "Recreate"),
        ({"registry": {"mirror": {"url": "s3://key:secret@b/v"}}}, "mirror"),
        ({"registry": {"mirror": {"credentials": "s"}}}, "are for registry.mirror.url"),
        ({"registry": {"mirror": {"url": "s3://b/v"}}, "networkPolicy": {"allowEgress": False}}, "DNS only"),
        ({"ingress": {"enabled": True, "host": "h"}}, "networkPolicy.from"),
        ({"ingress": {"enabled": True}, "networkPolicy": {"enabled": False}}, "ingress.host"),
        ({"gateway": {"enabled": True}, "networkPolicy": {"enabled": False}}, "gateway.parentRefs"),
        ({"serviceMonitor": {"enabled": True}}, "networkPolicy.metricsFrom"),
        ({"cache": {"sizeLimit": "1Gi"}}, "sizeLimit"),
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
