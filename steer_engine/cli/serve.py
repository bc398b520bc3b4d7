"""`steer-engine serve`: its help, and what can be checked before vLLM is imported, which takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer_engine.errors import ModelError, UnsupportedEngineError
from steer_engine.fields import parse_blocks
from steer_engine.models import PACKAGED, checkpoint_path
from steer_engine.settings import VECTORS_ENV
from steer_engine.spelling import closest
from steer_engine.vllm.flags import add_flags, own_flags, refuse_unknown_flags, vectors_folder

DEFAULT_PORT = 8000
"""vLLM's."""

CONNECT_SECONDS = 2.0
"""Limit for reaching the hub. A hub that is slower is left to vLLM."""

EPILOG = """\
Often used, of vLLM's flags:
  --host HOST, --port N     where to listen (default: every address, port 8000)
  --api-key KEY             key that clients must send; better in the variable VLLM_API_KEY
  --served-model-name NAME  name of the model for clients
  --max-model-len N         longest prompt and answer together, in tokens
  --tensor-parallel-size N  number of GPUs
  --config FILE             flags from a YAML file

All of vLLM's flags: steer-engine serve --help=all; their groups: --help=listgroup; one group or flag: --help=NAME.

Example:
  steer-engine serve smollm2-135m --steering-vectors vectors/
"""


def wants_help(argv: Sequence[str]) -> bool:
    """Whether our own help is requested. `--help=all` and the like are vLLM's."""
    return any(word in ("-h", "--help") for word in argv)


def help_text() -> str:
    """The help of `serve`: our flags, and how to see vLLM's."""
    parser = argparse.ArgumentParser(
        prog="steer-engine serve", usage="steer-engine serve MODEL [--steering-...] [any flag of vllm serve]",
        description="Serve MODEL through vLLM's own OpenAI-compatible server, armed for steering. MODEL is a Hugging "
        f"Face id, a folder, or a packaged model ({', '.join(PACKAGED)}).",
        epilog=EPILOG, add_help=False, formatter_class=_Formatter,
    )  # fmt: skip
    add_flags(parser.add_argument_group("Steering"))
    return parser.format_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, and leaves the epilog as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def check_start(argv: Sequence[str]) -> None:
    """Check the flags of a start, without vLLM. What a file given by `--config` sets is checked by vLLM.

    Raises:
        SteerError: the server cannot start so; the message says what to do.
        ModuleNotFoundError: vLLM is not installed.
    """
    if any(word.startswith("--help=") for word in argv):
        return
    refuse_unknown_flags(argv)
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("vLLM is missing", name="vllm")
    own = own_flags(argv)
    if own.steering_vectors is not None or os.environ.get(VECTORS_ENV):
        vectors_folder(own.steering_vectors)
    blocks = _blocks(own.steering_blocks)
    model = _model(argv)
    if model is not None:
        check_model_name(model)
        check_blocks(blocks, model)
    check_port(argv)


def _blocks(given: str | None) -> tuple[int, ...] | None:
    try:
        return None if given is None else parse_blocks(given)
    except ValueError as error:
        raise UnsupportedEngineError(f"--steering-blocks: {error}") from None


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
    """Raise ModelError for a model that is no packaged one, no folder, and not on the hub as far as can be known."""
    if model in PACKAGED or "://" in model or Path(model).expanduser().exists():
        return
    if model.startswith(("/", "./", "../", "~")):
        raise ModelError(f"There is no folder {model}. MODEL is a folder with a checkpoint, a Hugging Face id, or a "
                         f"packaged model: {', '.join(PACKAGED)}.")  # fmt: skip
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true") or _cached_config(model) is not None:
        return
    known = closest(model, PACKAGED, 3)
    if "/" not in model:
        raise ModelError(
            f"There is no model {model!r}. Closest packaged model: {known[0]} (steer-engine models list). "
            "A Hugging Face id is written OWNER/NAME; a folder must exist."
        )
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelError(f"The model {model!r} is not in the hub's cache, and HF_HUB_OFFLINE is set. Unset it, or use "
                         f"a folder or a packaged model: {', '.join(known)}.")  # fmt: skip
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not _reachable(endpoint):
        raise ModelError(f"The model {model!r} is not in the hub's cache, and {endpoint} is unreachable. Check the "
                         f"network, or use a folder or a packaged model: {', '.join(known)}.")  # fmt: skip


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


def _reachable(endpoint: str) -> bool:
    """Whether a hub may answer. True if it is only slow."""
    import httpx

    try:
        httpx.head(endpoint, timeout=CONNECT_SECONDS)
    except httpx.ConnectError as error:
        return "certificate" in str(error).lower()  # the hub's client may know another authority
    except (httpx.HTTPError, httpx.InvalidURL):
        return True
    return True


def check_blocks(blocks: tuple[int, ...] | None, model: str) -> None:
    """Raise UnsupportedEngineError for blocks that the model does not have, where its configuration is here."""
    folder = checkpoint_path(PACKAGED[model]) if model in PACKAGED else Path(model).expanduser()
    config = folder / "config.json" if folder.is_dir() else None
    if not blocks or (config is None and "/" not in model):
        return
    num_blocks = _num_blocks(config or _cached_config(model))
    if num_blocks is not None and blocks[-1] >= num_blocks:
        raise UnsupportedEngineError(
            f"--steering-blocks names block {blocks[-1]}; {model} has {num_blocks} blocks, 0-{num_blocks - 1}."
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
