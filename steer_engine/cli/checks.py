"""What can be checked before vLLM, torch or Ray are imported, which takes seconds: for every command with a model.

`check_start` is for the flags of `serve` (also in `batch` and `doctor`), `check_model` for the other commands.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_engine.errors import ModelError, UnsupportedEngineError
from steer_engine.fields import block_ranges, parse_blocks, without_password
from steer_engine.models import PACKAGED, check_obtainable, checkpoint_path
from steer_engine.monitor import MonitorSpec
from steer_engine.settings import VECTORS_ENV
from steer_engine.spelling import closest
from steer_engine.vllm.flags import own_flags, parse_sites, refuse_unknown_flags, vectors_folder

DEFAULT_PORT = 8000
"""vLLM's."""

HUB_SECONDS = 2.0
"""Limit for each step of asking the hub. A hub that answers later is left to its own client."""

CONFIGS = ("config.json", "params.json")
"""A folder with a checkpoint has one of them; the second is Mistral's."""


def check_start(argv: Sequence[str], *, listens: bool = True) -> None:
    """Check the flags of `serve`. What a file given by `--config` sets is checked by vLLM.

    listens: the command opens the port.

    Raises:
        SteerError: the engine cannot start so; the message says what to do.
        ModuleNotFoundError: vLLM is not installed.
    """
    if any(word.startswith("--help=") for word in argv):
        return
    refuse_unknown_flags(argv)
    require_modules("vllm")
    own = own_flags(argv)
    if own.steering_vectors is not None or os.environ.get(VECTORS_ENV):
        vectors_folder(own.steering_vectors)
    for text in own.steering_monitor:
        MonitorSpec.parse(text)
    if own.steering_sites is not None:
        parse_sites(own.steering_sites)
    model = None if _value(argv, "--hf-config-path") else _model(argv)  # then the folder needs no config.json
    wanted = {
        flag: _parsed(flag, text)
        for flag, text in (("--steering-blocks", own.steering_blocks), ("--steering-capture", own.steering_capture))
        if text is not None
    }
    if model is not None:
        check_model_name(model)
        for flag, blocks in wanted.items():
            _check_blocks(blocks, model, flag)
    if listens:
        check_port(argv)


def check_model(model: str, *blocks: str, modules: Sequence[str] = ("vllm",)) -> None:
    """Check what `derive`, `eval` and their like are given. blocks: texts of `--blocks`. modules: that they import.

    Raises:
        SteerError: the model does not exist, as far as can be known, or lacks a block.
        ModuleNotFoundError: a module is not installed.
    """
    require_modules(*modules)
    check_model_name(model)
    for text in blocks:
        _check_blocks(_parsed("--blocks", text), model, "--blocks")


def check_capture(model: str, blocks: str = "all", *, ray_address: str | None) -> None:
    """As `check_model`, for a command whose engines capture texts. On a cluster, only its nodes need model and vLLM."""
    if ray_address is not None:
        require_modules("ray", "scipy")
    else:
        check_model(model, blocks, modules=("vllm", "ray", "scipy"))


def require_modules(*names: str) -> None:
    """Raise ModuleNotFoundError for a module that is not installed; imports none."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is missing", name=name)


def _parsed(flag: str, text: str) -> tuple[int, ...] | None:
    try:
        return parse_blocks(text)
    except ValueError as error:
        raise UnsupportedEngineError(f"{flag}: {error}.") from None


def _value(argv: Sequence[str], *names: str) -> str | None:
    """The last value of a flag, written `--flag value` or `--flag=value`, with `-` or `_`."""
    found = None
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        name, sign, value = word.partition("=")
        if name.replace("_", "-") in names:
            found = value if sign else following
    return found


def _model(argv: Sequence[str]) -> str | None:
    """The model: the first word, or `--model`. None where only vLLM's parser could tell, such as with `--config`."""
    if argv and not argv[0].startswith("-"):
        return argv[0]
    return _value(argv, "--model")


def check_model_name(model: str) -> None:
    """Raise ModelError for a model that is no packaged one, no checkpoint, and not on the hub as far as can be known;
    and for a packaged one that cannot be converted.

    Asks the hub once, unless its configuration is in the cache. Never waits for long.
    """
    path = Path(model).expanduser()
    if model in PACKAGED:
        check_obtainable(PACKAGED[model])
    elif "://" in model:
        return
    elif path.exists():
        _check_checkpoint(path)
    elif model.startswith(("/", "./", "../", "~")):
        raise ModelError(f"There is no folder {model}. MODEL is a folder with a checkpoint, a Hugging Face id, or a "
                         f"packaged model: {', '.join(PACKAGED)}.")  # fmt: skip
    elif os.environ.get("VLLM_USE_MODELSCOPE", "").lower() not in ("1", "true") and _cached_config(model) is None:
        _check_hub(model, closest(model, PACKAGED, 3))


def _check_checkpoint(path: Path) -> None:
    """Raise ModelError for a folder or file that is no checkpoint."""
    if not os.access(path, os.R_OK):
        raise ModelError(f"{path} cannot be read; change its permissions.")
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{path} is a file. MODEL is a folder with a checkpoint (config.json and weights).")
    if path.is_dir() and not any((path / name).is_file() for name in CONFIGS) and not any(path.glob("*.gguf")):
        raise ModelError(f"The folder {path} has no config.json, so it is no checkpoint. Name the folder that has one.")


def _check_hub(model: str, known: Sequence[str]) -> None:
    if "/" not in model:
        raise ModelError(
            f"There is no model {model!r}. Closest packaged model: {known[0]} (steer-engine models list). "
            "A Hugging Face id is written OWNER/NAME; a folder must exist."
        )
    instead = f"use a folder or a packaged model: {', '.join(known)}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelError(f"The model {model!r} is not in the hub's cache, and HF_HUB_OFFLINE is set. Unset it, or "
                         f"{instead}.")  # fmt: skip
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    status = _hub_status(endpoint, model)
    shown = without_password(endpoint)
    if status is None:
        raise ModelError(f"The model {model!r} is not in the hub's cache, and {shown} is unreachable. Check the "
                         f"network, or {instead}.")  # fmt: skip
    if status in (401, 404):  # the hub does not tell whether a private model exists
        raise ModelError(f"{shown} has no model {model!r} (or it is private: set HF_TOKEN). Check the spelling, or "
                         f"{instead}.")  # fmt: skip


def _cached_config(model: str) -> Path | None:
    """The configuration of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository = model.partition(":")[0]
    try:
        found = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _hub_status(endpoint: str, model: str) -> int | None:
    """Status of the hub's answer about a model; 0 if it is only slow, or if only its own client can tell; None if it
    cannot be reached.
    """
    import httpx
    from huggingface_hub import get_token

    repository = model.partition(":")[0]
    if repository.count("/") != 1:
        return 0
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.head(f"{endpoint}/api/models/{repository}", timeout=HUB_SECONDS, headers=headers)
    except httpx.ConnectError as error:
        return 0 if "certificate" in str(error).lower() else None  # the hub's client may know another authority
    except httpx.ConnectTimeout:
        return None
    except (httpx.HTTPError, httpx.InvalidURL):
        return 0
    return answer.status_code


def _check_blocks(blocks: Iterable[int] | None, model: str, flag: str) -> None:
    """Raise UnsupportedEngineError for blocks that the model does not have, where its configuration is here."""
    folder = checkpoint_path(PACKAGED[model]) if model in PACKAGED else Path(model).expanduser()
    config = folder / "config.json" if folder.is_dir() else None
    if not blocks or (config is None and "/" not in model):
        return
    num_blocks = _num_blocks(config or _cached_config(model))
    missing = [] if num_blocks is None else [block for block in blocks if block >= num_blocks]
    if num_blocks is not None and missing:
        raise UnsupportedEngineError(
            f"{flag} names block {block_ranges(missing)}; {model} has {num_blocks} blocks, 0-{num_blocks - 1}."
        )


def _num_blocks(config: Path | None) -> int | None:
    try:
        content: Any = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
        found = content.get("num_hidden_layers") or content.get("text_config", {}).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def check_port(argv: Sequence[str]) -> None:
    """Raise UnsupportedEngineError if the port is in use. vLLM's socket would share it, and get half the requests."""
    port = _value(argv, "--port") or (None if _value(argv, "--config") else str(DEFAULT_PORT))
    if port is None or not port.isdecimal() or "--headless" in argv or _value(argv, "--uds") is not None:
        return
    if int(port) > 65535:
        raise UnsupportedEngineError(f"--port {port} is not a port; valid are 1 to 65535.")
    host = _value(argv, "--host") or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except socket.gaierror as error:
            raise UnsupportedEngineError(f"--host {host} is unknown ({error.strerror}).") from None
        except OSError as error:
            raise UnsupportedEngineError(
                f"Port {port} cannot be used ({error.strerror}). Stop what listens there, or choose another: --port "
                f"{int(port) + 1 if int(port) < 65535 else DEFAULT_PORT}."
            ) from None
