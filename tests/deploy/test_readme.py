"""deploy/README.md: its numbers are the engine's; its flags, values and files exist; its commands render the chart."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helm_python import Chart
from helpers.doc_blocks import all_blocks, commands

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.stream import StreamForm
from steer_engine.settings import EngineLimits, SteeringConfig
from steer_engine.vllm.flags import add_flags

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
README = (DEPLOY / "README.md").read_text()
TEXTS = [path for path in DEPLOY.rglob("*") if path.suffix in (".md", ".yaml", ".yml", ".cuda", ".cpu", ".example")]
MAX_TOKENS = 8192
"""Per batch; the routing buffers need 320 KiB for them."""


def sizing() -> list[list[str]]:
    rows = re.findall(r"^\| (7B|70B)(.*)\|$", README, re.MULTILINE)
    return [[name, *(cell.strip() for cell in rest.split("|"))] for name, rest in rows]


@pytest.mark.parametrize("row", sizing(), ids=lambda row: f"{row[0]}-{row[3]}-{row[4]}")
def test_sizes_are_what_an_engine_allocates(row: list[str]) -> None:
    _, _, shape, requests, rows, memory, in_host, in_store = row
    num_blocks, hidden_size = (int(number) for number in shape.split(" × "))
    runtime = EngineRuntime(
        config=SteeringConfig(rows=int(rows)),
        forms=dict.fromkeys(range(num_blocks), StreamForm.SPLIT),
        capture_blocks=(),
        hidden_size=hidden_size,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        max_requests=int(requests),
        max_tokens=MAX_TOKENS,
        num_drafts=0,
        use_triton=True,
    )
    assert memory == f"{runtime.num_bytes / 2**30:.2f} GiB"
    vector = num_blocks * hidden_size * 4
    assert in_host == f"{vector / 2**20:.1f} MiB"
    assert int(in_store) == EngineLimits().store_bytes // vector


def test_the_table_has_both_sizes_of_model() -> None:
    assert {row[0] for row in sizing()} == {"7B", "70B"}


def flags() -> Iterator[tuple[str, str]]:
    """File and flag of every command line of `steer-engine serve` in deploy/."""
    for path in TEXTS:
        for flag in re.findall(r"--[a-z][a-z-]*[a-z]\b(?!-)", path.read_text()):
            yield path.name, flag


@functools.cache
def vllm_source() -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    files = ("engine/arg_utils.py", "entrypoints/openai/cli_args.py")
    return "".join((folder / name).read_text() for name in files if (folder / name).exists())


def test_steering_flags_exist() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    used = {flag for _, flag in flags() if flag.startswith("--steering")}
    assert len(used) >= 4
    assert used <= set(parser._option_string_actions)


@pytest.mark.parametrize(
    "flag",
    ["--tensor-parallel-size", "--data-parallel-size", "--max-model-len", "--max-num-seqs", "--shutdown-timeout",
     "--distributed-executor-backend", "--served-model-name"],
)  # fmt: skip
def test_other_flags_exist_in_vllm(flag: str) -> None:
    assert flag in {used for _, used in flags()}, "no longer used: remove it here"
    assert flag in vllm_source() or re.search(rf"^    {flag[2:].replace('-', '_')}\b", vllm_source(), re.MULTILINE)


def test_values_exist_in_the_chart() -> None:
    values = yaml.safe_load((DEPLOY / "helm" / "steer-engine" / "values.yaml").read_text())
    for key in re.findall(r"--set ([\w.]+)=", README):
        found = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]


def test_helm_commands_render() -> None:
    chart = DEPLOY / "helm" / "steer-engine"
    shell = "".join(block.text for block in all_blocks() if block.page == "deploy/README.md")
    calls = [words for words in commands(shell, "helm") if words[0] in ("install", "upgrade")]
    assert len(calls) == 2
    given = {}
    for _, name, folder, *flags in calls:
        assert (DEPLOY.parent / folder).resolve() == chart
        for assignment in (value for flag, value in pairwise(flags) if flag == "--set"):
            given |= nested(*assignment.split("=", 1))  # an upgrade reuses the values
        with Chart.load(str(chart)) as loaded:
            rendered = loaded.render(given, name=name, namespace="default")
        assert any("kind: Deployment" in text for text in rendered.values())


def nested(path: str, value: str) -> dict[str, Any]:
    """The values of `--set path=value` for a path of at most two parts. A number becomes one, as in Helm."""
    known = yaml.safe_load((DEPLOY / "helm" / "steer-engine" / "values.yaml").read_text())
    first, _, second = path.partition(".")
    scalar = int(value) if value.isdigit() else value
    return {first: {**known[first], second: scalar} if second else scalar}


def test_files_of_commands_exist() -> None:
    shell = "".join(block.text for block in all_blocks() if block.page == "deploy/README.md")
    files = re.findall(r"\bdeploy/[\w./-]+", shell)
    assert len(files) >= 3
    for name in files:
        assert (DEPLOY.parent / name).exists(), name


def test_named_alerts_and_metrics_exist() -> None:
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text()
    page = (DEPLOY.parent / "docs" / "deploying.md").read_text()
    for alert in re.findall(r"`(SteerEngine\w+)`", README + page):
        assert f"alert: {alert}\n" in rules
    assert set(re.findall(r"alert: (\w+)", rules)) == set(re.findall(r"`(SteerEngine\w+)`", page))
    assert "steer_engine_registry_readable" in rules
