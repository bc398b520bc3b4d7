"""The KubeRay manifests: objects against the operator's schemas, pods against Kubernetes', commands against our command
line.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.kubernetes import Manifest, validate, validate_pod
from jsonschema import Draft202012Validator

import steer_engine
from steer_engine.cli.derive import derive_command
from steer_engine.cli.evaluate import eval_command
from steer_engine.settings import SteeringConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMMANDS = {"derive": derive_command, "eval": eval_command}
FILES = sorted((DEPLOY / "kuberay").glob("*.yaml"))


SCHEMAS = Path(__file__).parent / "kuberay_1_1"
NEWER: dict[str, dict[str, Any]] = {"RayJob": {"backoffLimit": {"type": "integer", "minimum": 0}}, "RayService": {}}
"""Fields that we use and that are newer than the kept schemas (1.2: `backoffLimit`)."""


def closed(schema: Any) -> Any:
    """The schema with unknown fields as errors: the API server would drop them silently."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return inner if "properties" not in schema or is_open else inner | {"additionalProperties": False}


def schema_of(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((SCHEMAS / f"{kind.lower()}.json").read_text())["properties"]["spec"]
    assert not spec["properties"].keys() & NEWER[kind].keys(), "the schema has this field now: remove it from NEWER"
    return closed(spec | {"properties": spec["properties"] | NEWER[kind]})  # type: ignore[no-any-return]


def errors_of(manifest: Manifest) -> list[str]:
    validator = Draft202012Validator(schema_of(manifest["kind"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest["spec"])]


def manifests() -> Iterator[tuple[str, Manifest]]:
    for path in FILES:
        for manifest in yaml.safe_load_all(path.read_text()):
            yield f"{path.stem}-{manifest['kind']}", manifest


ALL = dict(manifests())
RAY = {name: each for name, each in ALL.items() if each["apiVersion"] == "ray.io/v1"}


def cluster_of(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]
    return found


def templates_of(manifest: Manifest) -> list[Manifest]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def test_the_four_manifests() -> None:
    assert {path.stem for path in FILES} == {
        "rayjob-derive", "rayjob-eval", "multi-node-server", "rayservice-experimental"
    }  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_objects_are_valid(name: str) -> None:
    manifest = ALL[name]
    if name not in RAY:
        validate(manifest)
        return
    assert errors_of(manifest) == []
    for template in templates_of(manifest):
        validate_pod(template)


@pytest.mark.parametrize("name", RAY)
def test_the_schemas_can_refuse(name: str) -> None:
    def broken(change: Callable[[Manifest], object]) -> list[str]:
        manifest = deepcopy(RAY[name])
        change(manifest)
        return errors_of(manifest)

    (misspelt,) = broken(lambda each: each["spec"].update(rayClusterspec={}))
    assert "rayClusterspec" in misspelt
    (deep,) = broken(lambda each: cluster_of(each)["workerGroupSpecs"][0].update(minReplica=1))
    assert "workerGroupSpecs[0]" in deep
    (kind,) = broken(lambda each: cluster_of(each)["headGroupSpec"]["rayStartParams"].update(num_cpus=0))
    assert "not of type 'string'" in kind
    (missing,) = broken(lambda each: cluster_of(each)["headGroupSpec"].pop("template"))
    assert "'template' is a required property" in missing
    (pod,) = broken(lambda each: templates_of(each)[0]["spec"]["containers"][0].update(images="x"))
    assert "containers[0]" in pod


@pytest.mark.parametrize("name", RAY)
def test_pods_are_confined_and_run_our_image(name: str) -> None:
    docker = (DEPLOY / "docker" / "Dockerfile.cuda").read_text()
    assert cluster_of(RAY[name])["rayVersion"] == re.search(r"^ARG RAY=(\S+)", docker, re.MULTILINE)[1]  # type: ignore[index]
    for template in templates_of(RAY[name]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["image"] == f"steer-engine:{steer_engine.__version__}-cuda"
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            volumes = {volume["name"] for volume in pod.get("volumes", ())}
            assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes


@pytest.mark.parametrize("name", [name for name, each in RAY.items() if each["kind"] == "RayJob"])
def test_commands_are_those_of_our_command_line(name: str) -> None:
    program, command, model, *rest = shlex.split(RAY[name]["spec"]["entrypoint"])
    assert program == "steer-engine"
    assert not model.startswith("-")
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    if command == "serve":
        # vLLM's own flags are checked in tests/deploy/test_readme.py.
        return
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(COMMANDS[command]).parameters}
    assert set(flags) <= known
    job = RAY[name]["spec"]
    assert "--ray-address" in flags or job["entrypointNumGpus"], "the driver's pod has no GPU"


def gpus_of_workers(name: str) -> int:
    (group,) = cluster_of(RAY[name])["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    return int(group["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"])


def test_there_is_a_gpu_for_each_engine() -> None:
    words = shlex.split(RAY["rayjob-derive-RayJob"]["spec"]["entrypoint"])
    actors, per_actor = (int(words[words.index(flag) + 1]) for flag in ("--actors", "--gpus-per-actor"))
    assert gpus_of_workers("rayjob-derive-RayJob") == actors * per_actor
    assert gpus_of_workers("rayjob-eval-RayJob") == RAY["rayjob-eval-RayJob"]["spec"]["entrypointNumGpus"]


def test_the_nodes_have_the_gpus_of_all_ranks() -> None:
    job = RAY["multi-node-server-RayJob"]
    words = shlex.split(job["spec"]["entrypoint"])
    wanted = int(words[words.index("--tensor-parallel-size") + 1])
    head, *others = templates_of(job)
    gpus = [t["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for t in (head, *others)]
    assert sum(gpus) == wanted
    drain = int(words[words.index("--shutdown-timeout") + 1])
    assert head["spec"]["terminationGracePeriodSeconds"] >= drain + 20
    service = ALL["multi-node-server-Service"]["spec"]["selector"]
    assert service.items() <= head["metadata"]["labels"].items()


def test_the_ray_service_arms_what_it_serves() -> None:
    config = yaml.safe_load(RAY["rayservice-experimental-RayService"]["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    hook = application["runtime_env"]["worker_process_setup_hook"].rpartition(".")
    assert callable(getattr(__import__(hook[0], fromlist=["register"]), hook[2]))
    (llm,) = application["args"]["llm_configs"]
    armed = SteeringConfig.from_additional_config(llm["engine_kwargs"]["additional_config"])
    assert armed is not None
    assert "EXPERIMENTAL" in (DEPLOY / "kuberay" / "rayservice-experimental.yaml").read_text()
