"""The help of `steer-engine serve`: our flags, and how to see vLLM's. vLLM is not imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from steer_engine.models import PACKAGED
from steer_engine.vllm.flags import add_flags

GROUPS = {
    "Vectors": ("--steering-vectors", "--steering-mirror", "--steering-mirror-seconds", "--steering-strict"),
    "What is armed": (
        "--steering-blocks", "--steering-ops", "--steering-rows", "--steering-bank-rows", "--steering-capture",
        "--steering-fuse-norm",
    ),
    "Requests": ("--steering-default", "--steering-limit"),
    "Output": ("--verbose",),
}  # fmt: skip
"""Our flags in the help, and the order of the groups. A flag that is in none of them is shown with those of REST."""

REST = "What is armed"

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
    add_flags(_Grouped(parser))
    return parser.format_help()


class _Grouped:
    """Stands for a parser, and adds each flag to its group in the help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._groups = {name: parser.add_argument_group(name) for name in GROUPS}

    def add_argument(self, flag: str, **settings: Any) -> None:
        name = next((name for name, flags in GROUPS.items() if flag in flags), REST)
        self._groups[name].add_argument(flag, **settings)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, and leaves the epilog as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
