"""The tokenizer, and the tags of the reasoning and tool parsers: the tokens that triggers look for. Wraps nothing.

Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from steer_engine.vllm.patching import Symbol
from steer_engine.vocabulary import Tags, Vocabulary, encode_with

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

USED = (
    Symbol("vllm.reasoning:ReasoningParserManager.get_reasoning_parser", ("name",)),
    Symbol("vllm.tool_parsers:ToolParserManager.get_tool_parser", ("name",)),
)

TOOL_TAGS = (
    ("tool_calls_start_token", "tool_calls_end_token"),
    ("tool_call_start_token", "tool_call_end_token"),
    ("bot_token", "eot_token"),
)
"""Where tool parsers keep their tags; the first pair whose start is set counts."""


def make_vocabulary(tokenizer: Any, vllm_config: VllmConfig, tool_parser: str | None = None) -> Vocabulary:
    """For an engine with this tokenizer (None with `--skip-tokenizer-init`).

    tool_parser: the name given to `--tool-call-parser`; an engine without a server has none.
    """

    def find_tags(name: str) -> Tags | str:
        if tokenizer is None:
            return "the engine has no tokenizer."
        if name == "tool_calls":
            return _tool_tags(tool_parser, tokenizer)
        return _reasoning_tags(vllm_config, tokenizer)

    return Vocabulary(encode_with(tokenizer), vllm_config.model_config.get_vocab_size(), find_tags)


def _reasoning_tags(vllm_config: VllmConfig, tokenizer: Any) -> Tags | str:
    from vllm.reasoning import ReasoningParserManager

    name = vllm_config.structured_outputs_config.reasoning_parser
    if not name:
        return "start the server with --reasoning-parser, or give the tags: {'after': '<think>', 'until': '</think>'}."
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
        start, end = parser.reasoning_start_str, parser.reasoning_end_str
    except Exception as error:  # a parser may raise anything for a tokenizer without its tokens
        logger.warning("The reasoning parser %s has no tags: %r", name, error)
        start = end = None
    if not start or not end:
        return f"the reasoning parser {name!r} has none; give the tags: {{'after': '<think>', 'until': '</think>'}}."
    return Tags(start, end)


def _tool_tags(name: str | None, tokenizer: Any) -> Tags | str:
    from vllm.tool_parsers import ToolParserManager

    if not name:
        return "start the server with --tool-call-parser, or give the tags: {'after': ..., 'until': ...}."
    try:
        parser = ToolParserManager.get_tool_parser(name)(tokenizer)
    except Exception as error:
        logger.warning("The tool parser %s has no tags: %r", name, error)
        parser = None
    for start_name, end_name in TOOL_TAGS:
        start, end = getattr(parser, start_name, None), getattr(parser, end_name, None)
        if isinstance(start, str) and start:
            return Tags(start, end if isinstance(end, str) and end else None)
    return f"the tool parser {name!r} has none; give the tags: {{'after': ..., 'until': ...}}."
