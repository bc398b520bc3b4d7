"""The `vllm.general_plugins` entry point: applies every patch, in every process that vLLM starts.

Importing this module imports nothing that can fail: vLLM skips a plugin whose import fails, with a log line, and the
server would start unsteered. Whatever can go wrong goes wrong inside `register`, which stops it.
"""

from __future__ import annotations


def register() -> None:
    """Check vLLM's version and symbols, then patch. Calling it again changes nothing.

    Raises:
        UnsupportedEngineError: this vLLM is not one that we know; names it, and what differs.
    """
    from steer_engine.runtime.vllm.logs import log_with_vllm
    from steer_engine.runtime.vllm.namespace_guard import hide_kernel_folder

    hide_kernel_folder()
    log_with_vllm()

    from vllm import __version__ as vllm_version

    from steer_engine.runtime.vllm import symbols
    from steer_engine.runtime.vllm.patching import check_symbols

    check_symbols(symbols.all_symbols(), vllm_version)
    for module in symbols.MODULES:
        module.hook()

    from steer_engine.serving.vllm import register as serving

    serving.register()
