"""`steer-engine doctor`: a model that can be served steered, configurations of large models, and refused ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import rescaled

from steer_engine.spec import Op

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "max_position_embeddings": 8192,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LARGE = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 28672},
}  # fmt: skip
"""Shapes of Llama 2; no weights, no tokenizer."""

LARGE_FLAGS = ["--memory-only", "--json", "--max-num-seqs", "256", "--max-num-batched-tokens", "2048"]


@pytest.fixture(scope="module")
def found(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Name of a run -> exit status and standard output."""
    folder = tmp_path_factory.mktemp("doctor")
    for name, shape in LARGE.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(LLAMA | shape))
    unknown = {"architectures": ["UnknownForCausalLM"], "model_type": "llama"}
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text(json.dumps(LLAMA | LARGE["7b"] | unknown))
    no_weights = folder / "no weights"
    shutil.copytree(tiny_llama, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    runs = {
        "7b": [str(folder / "7b"), *LARGE_FLAGS],
        "70b": [str(folder / "70b"), *LARGE_FLAGS, "--tensor-parallel-size", "8"],
        "70b lean": [str(folder / "70b"), *LARGE_FLAGS, "--steering-rows", "1", "--steering-blocks", "20-39"],
        "fast prefill": [str(folder / "7b"), *LARGE_FLAGS, "--kv-sharing-fast-prefill"],
        "flag": [tiny_llama, "--memory-only", "--steering-row", "3"],
        "blocks": [tiny_llama, "--memory-only", "--steering-blocks", "1-3"],
        "unknown": [str(folder / "unknown"), "--memory-only"],
        "adapters": [tiny_llama, "--memory-only", "--json", "--enable-lora"],
        "dead": [str(rescaled(Path(tiny_llama), folder / "dead", {"model.norm.weight": 0.0}))],
        "no weights": [
            str(no_weights),
            "--max-num-seqs",
            "8",
            "--steering-sites",
            "mlp",
            "--tensor-parallel-size",
            "2",
        ],
        "site": [tiny_llama, "--memory-only", "--steering-sites", "ffn"],
        "tiny": [
            tiny_llama,
            "--json",
            "--max-num-seqs",
            "8",
            "--dtype",
            "float32",
            "--steering-fuse-norm",
            "--steering-sites",
            "attn,mlp",
        ],
        "tiny table": [tiny_llama, "--memory-only", "--max-num-seqs", "8", "--dtype", "float32"],
    }
    script = Path(__file__).parents[1] / "helpers" / "examinations.py"
    command = [sys.executable, "-P", str(script), str(folder / "out.json"), json.dumps(list(runs.values()))]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "NO_COLOR": "1", "COLUMNS": "160"}
    environment |= {"STEER_ENGINE_VECTORS": str(folder)}
    subprocess.run(command, check=True, timeout=250, env=environment)
    return dict(zip(runs, json.loads((folder / "out.json").read_text()), strict=True))


def diagnosis(found: dict[str, tuple[int, str]], name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(found[name][1])
    return result


@pytest.mark.parametrize(
    ("name", "bank"),
    [
        ("7b", 256 * 32 * 4 * 4096 * 2),
        ("70b", 256 * 80 * 4 * 8192 * 2),
        ("70b lean", 256 * 20 * 1 * 8192 * 2),
    ],
)
def test_memory_of_large_models_by_configuration(found: dict[str, tuple[int, str]], name: str, bank: int) -> None:
    status, _ = found[name]
    shown = diagnosis(found, name)
    assert (status, shown["serves"], shown["against"]) == (0, True, [])
    assert shown["probed_blocks"] == 0
    memory = shown["memory"]
    assert memory["bank"] == bank
    sites = len(shown["armed_blocks"])
    # Per slot, slot 0 included, and with room for 8 probes at a block beside the rows:
    # 16 words per entry and their number for each site, one flag, and two span bounds; 8
    # triggers of 18 words, their number, and 9 positions of history with a token and two words per trigger; 8
    # conditions of three float64.
    limited = 8 * 18 + 1 + 9 * (1 + 2 * 8) + 8 * 3 * 2
    assert memory["programs"] == 4 * 257 * (sites * (16 * (shown["rows"] + 8) + 1) + 1 + 2 + limited)
    # A slot, a position and the windows of 8 triggers.
    assert 10 * 4 * 2048 <= memory["routing"] <= 10 * 4 * 2064
    # 8 probes at each block, but no more than 256 numbers per token.
    numbers = min(8 * sites, 256)
    assert 4 * 2048 * numbers <= memory["probes"] <= 4 * 2064 * numbers
    assert memory["device"] == bank + memory["programs"] + memory["routing"] + memory["probes"]
    assert memory["host_vector"] == 4 * shown["hidden_size"] * shown["num_blocks"]


def test_a_model_that_can_be_served(found: dict[str, tuple[int, str]]) -> None:
    status, _ = found["tiny"]
    shown = diagnosis(found, "tiny")
    assert (status, shown["serves"]) == (0, True), shown["against"]
    assert shown["num_symbols"] > 60
    assert shown["num_different"] == 0
    assert shown["forms"] == {"split": [0, 1, 2]}
    assert (shown["probed_blocks"], shown["num_blocks"], shown["weights"]) == (3, 3, "real")
    assert shown["runner"] in ("V1", "V2")
    assert shown["runner_reason"]
    assert shown["ops"] == [*Op]
    if shown["kernel"].startswith("PyTorch"):
        assert shown["kernel"].startswith("PyTorch, not fused: ")
    assert shown["site_modules"] == {"attn": ["self_attn"], "mlp": ["mlp"]}
    assert shown["memory"]["bank"] == 3 * (8 * 3 * 4 * 64 * 4), "three blocks at three sites each"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fast prefill", "kv_sharing_fast_prefill"),
        ("flag", "--steering-row"),
        ("blocks", "3 blocks"),
        ("site", "--steering-sites: 'ffn' is not a site; valid: attn, mlp"),
        ("unknown", "UnknownForCausalLM"),
        ("dead", "no known form"),
    ],
)
def test_a_configuration_that_the_server_would_refuse(found: dict[str, tuple[int, str]], name: str, words: str) -> None:
    status, printed = found[name]
    assert status == 1
    assert words in printed
    if name == "fast prefill":
        assert not diagnosis(found, name)["serves"]
    else:
        assert "no: " in printed
        assert "yes: " not in printed


def test_a_yes_without_the_weights_says_so(found: dict[str, tuple[int, str]]) -> None:
    status, printed = found["no weights"]
    assert status == 0, printed
    assert "yes: it can be served steered, judging by a copy with random weights" in printed
    assert "site mlp" in printed
    assert "after mlp; of one rank: if the 2 ranks have shares of it, the server refuses it" in printed
    assert "its own weights were not examined" not in found["tiny table"][1]


def test_requests_that_an_engine_with_adapters_refuses(found: dict[str, tuple[int, str]]) -> None:
    (refused,) = diagnosis(found, "adapters")["refused"]
    assert "prompt_logprobs" in refused
    assert diagnosis(found, "7b")["refused"] == []


def test_the_printed_table(found: dict[str, tuple[int, str]], tiny_llama: str) -> None:
    status, printed = found["tiny table"]
    assert status == 0
    for words in (tiny_llama, "3 of 3 blocks: 0-2", "24.0 KiB", "8 requests of 4 rows", "nothing was loaded"):
        assert words in printed
