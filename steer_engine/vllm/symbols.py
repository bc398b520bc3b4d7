"""The symbols of vLLM's API side that Steer Engine wraps or calls, with the parameters that it relies on.

Known for vLLM 0.32 and 0.33. They are checked when the hooks are set and in a test, so that another vLLM fails there,
by name, and never by serving a request unsteered.
"""

from __future__ import annotations

from steer_engine.vllm.patching import Symbol

_OPENAI = "vllm.entrypoints.openai"
_CHAT = f"{_OPENAI}.chat_completion.serving:OpenAIServingChat"
_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens"
_COMPLETION = f"{_OPENAI}.completion.serving:OpenAIServingCompletion"

ASYNC_LLM_INIT = Symbol("vllm.v1.engine.async_llm:AsyncLLM.__init__", ("vllm_config",))
ASYNC_LLM_GENERATE = Symbol("vllm.v1.engine.async_llm:AsyncLLM.generate", ("prompt", "sampling_params", "request_id"))
ASYNC_LLM_SHUTDOWN = Symbol("vllm.v1.engine.async_llm:AsyncLLM.shutdown", ("timeout",))
CHECK_MODEL = Symbol("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("request",))
POOLING_CHECK_MODEL = Symbol("vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model", ("request",))
SHOW_MODELS = Symbol(f"{_OPENAI}.models.serving:OpenAIServingModels.show_available_models")
CHAT_FULL = Symbol(f"{_CHAT}.chat_completion_full_generator", ("request", "model_name"))
CHAT_STREAM = Symbol(f"{_CHAT}.chat_completion_stream_generator", ("request", "model_name"))
CHAT_BATCH_FULL = Symbol(
    f"{_OPENAI}.chat_completion.batch_serving:OpenAIServingChatBatch.chat_completion_full_generator_batch",
    ("request", "model_name"),
)
COMPLETION_FULL = Symbol(
    f"{_COMPLETION}.request_output_to_completion_response", ("final_res_batch", "request", "model_name")
)
COMPLETION_STREAM = Symbol(f"{_COMPLETION}.completion_stream_generator", ("request", "model_name"))
RESPONSE_FROM_REQUEST = Symbol(
    f"{_OPENAI}.responses.protocol:ResponsesResponse.from_request", ("request", "model_name")
)
_OUTPUT = "vllm.v1.engine.output_processor"
OUTPUT_ADD_REQUEST = Symbol(f"{_OUTPUT}:OutputProcessor.add_request", ("request",))
DO_TRACING = Symbol(f"{_OUTPUT}:OutputProcessor.do_tracing", ("engine_core_output", "req_state"))
INSTRUMENT_MANUAL = Symbol(f"{_OUTPUT}:instrument_manual", ("span_name", "attributes"))
TOKENS_FULL = Symbol(f"{_TOKENS}.serve_tokens_full_generator", ("request", "model_name"))
TOKENS_STREAM = Symbol(f"{_TOKENS}.serve_tokens_stream_generator", ("request", "model_name"))
MESSAGES_BASE_REQUEST = Symbol(
    "vllm.entrypoints.anthropic.serving:AnthropicServingMessages._build_base_request",
    ("anthropic_request", "openai_messages"),
)
CLI_ENV_SETUP = Symbol(
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup", moved_to="vllm.entrypoints.common.startup:cli_env_setup"
)

WRAPPED = (
    ASYNC_LLM_INIT,
    ASYNC_LLM_GENERATE,
    ASYNC_LLM_SHUTDOWN,
    CHECK_MODEL,
    POOLING_CHECK_MODEL,
    SHOW_MODELS,
    CHAT_FULL,
    CHAT_STREAM,
    CHAT_BATCH_FULL,
    COMPLETION_FULL,
    COMPLETION_STREAM,
    RESPONSE_FROM_REQUEST,
    MESSAGES_BASE_REQUEST,
    OUTPUT_ADD_REQUEST,
    DO_TRACING,
    INSTRUMENT_MANUAL,
    TOKENS_FULL,
    TOKENS_STREAM,
)

USED = (
    Symbol(f"{_OPENAI}.chat_completion.protocol:ChatCompletionResponse"),
    Symbol(f"{_OPENAI}.responses.serving:OpenAIServingResponses"),
    Symbol("vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateRequest"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateResponseBase"),
    Symbol("vllm.entrypoints.serve.engine.protocol:ErrorResponse"),
    Symbol("vllm.entrypoints.serve.engine.protocol:ErrorInfo"),
    Symbol("vllm.exceptions:VLLMClientError"),
    Symbol("vllm.exceptions:VLLMValidationError"),
    Symbol("vllm.exceptions:GracefulHTTPError.__init__", ("message", "http_status")),
    Symbol("vllm.v1.engine.async_llm:AsyncLLM.abort", ("request_id", "internal")),
    Symbol("vllm.v1.engine.output_processor:OutputProcessor.abort_requests", ("request_ids", "internal")),
    Symbol("vllm.v1.engine.output_processor:OutputProcessor.get_num_unfinished_requests"),
)

ALL = (*WRAPPED, *USED)
"""What a process that serves needs."""

COMMAND = (
    Symbol("vllm.entrypoints.launchers.api_server.entry:build_async_engine_client", ("args",)),
    Symbol("vllm.entrypoints.launchers.app:build_app", ("args", "supported_tasks", "model_config")),
    Symbol("vllm.entrypoints.launchers.api_server.app_state:init_app_state", ("engine_client", "state", "args")),
    Symbol("vllm.entrypoints.cli.serve:ServeSubcommand.subparser_init", ("subparsers",)),
    Symbol("vllm.entrypoints.cli.serve:ServeSubcommand.validate", ("args",)),
    Symbol("vllm.entrypoints.cli.serve:ServeSubcommand.cmd", ("args",)),
    CLI_ENV_SETUP,
    Symbol("vllm.logger:configure_logging_from_args"),
    Symbol("vllm.platforms:current_platform"),
    Symbol("vllm.utils.argparse_utils:FlexibleArgumentParser"),
)
"""What `steer-engine serve` and `batch` call; not asked of processes that only serve."""
