"""Both plugin entry points: `register` patches every process, `SteerEndpointPlugin` equips an API server.

vLLM skips a plugin whose import fails, with a log line, and would then serve unsteered. So importing this module
imports nothing that can fail; whatever can fail does so inside a call, which stops the process.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_engine.errors import UnsupportedEngineError

KERNEL_FOLDER = "triton_kernels"


def register() -> None:
    """The `vllm.general_plugins` entry point: check vLLM's symbols and patch. Calling it again changes nothing.

    vLLM calls it in every process that it starts, before a model is loaded.

    Raises:
        UnsupportedEngineError: an unknown vLLM; names its version and what differs.
    """
    import logging

    hide_kernel_folder()
    # vLLM configures its own logger only: our lines go through it, in its format and at its level.
    logging.getLogger("steer_engine").parent = logging.getLogger("vllm")

    from steer_engine.vllm import symbols
    from steer_engine.vllm.lifetime import end_with_parent
    from steer_engine.vllm.patching import Patch, apply, check_symbols

    end_with_parent()
    check_symbols(symbols.engine_symbols(), symbols.vllm_version())
    for module in symbols.ENGINE_MODULES:
        module.install()
    # Every front end (`vllm serve`, `run-batch`, Ray Serve) makes an AsyncLLM before it builds its routes. Importing
    # the routes costs seconds, which workers need not spend.
    apply([Patch(symbols.ASYNC_LLM_INIT, _register_api_first)])


def _register_api_first(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from steer_engine.vllm.lifetime import exiting_on_sigterm

        register_api()
        with exiting_on_sigterm():
            original(self, *args, **kwargs)

    return __init__


def register_api() -> None:
    """Check and patch the API side. Calling it again changes nothing.

    Raises:
        UnsupportedEngineError: as `register`.
    """
    from steer_engine.vllm import symbols
    from steer_engine.vllm.patching import check_symbols

    check_symbols(symbols.api_symbols(), symbols.vllm_version())
    for module in symbols.api_modules():
        module.install()


class SteerEndpointPlugin:
    """The `vllm.endpoint_plugins` entry point: routes, middleware and readiness.

    Loaded where `VLLM_PLUGINS` names `steer_engine`, which `steer-engine serve` does.
    """

    name = "steer_engine"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add our routes and the middleware. vLLM calls this once, after it has added its own routes."""
        from steer_engine.api import registry_routes, routes
        from steer_engine.api.gates import DrainGate
        from steer_engine.api.middleware import SteeringMiddleware
        from steer_engine.api.routing import AdminKeys
        from steer_engine.settings import ApiLimits, EngineLimits

        app.include_router(routes.router)
        app.include_router(registry_routes.vector_router)
        app.include_router(registry_routes.preset_router)
        app.include_router(routes.playground_router)
        app.state.steering_api_limits = ApiLimits.from_environment()
        app.state.steering_engine_limits = EngineLimits.from_environment()
        app.state.steering_admin_keys = keys = AdminKeys.from_environment()
        app.state.steering_drain = drain = DrainGate()
        app.add_middleware(SteeringMiddleware, limits=app.state.steering_api_limits, drain=drain)
        routes.document_field(app)
        _admit_admin_keys(app.state.args, keys.plain_keys())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Check that every engine and worker is armed like this process, and start the background tasks.

        Raises:
            UnsupportedEngineError, CapacityError: they are not; the server does not start.
        """
        import asyncio

        from steer_engine.api.background import Readiness, refresh_gauges, start_mirror
        from steer_engine.api.gates import QueueLimit
        from steer_engine.api.registry_routes import Uploads
        from steer_engine.vllm.engine_client import handshake, in_flight, num_waiting, watch
        from steer_engine.vllm.intake import frontend_of
        from steer_engine.vllm.tags import make_vocabulary

        frontend = frontend_of(engine_client)
        if frontend is None:
            raise UnsupportedEngineError(
                "The general plugin 'steer_engine' is not loaded in the API process; start with 'steer-engine serve', "
                "or name the plugin in VLLM_PLUGINS."
            )
        limits = state.steering_api_limits
        state.steering_frontend = frontend
        frontend.log_requests = bool(args.enable_log_requests)
        frontend.drain = state.steering_drain
        state.steering_readiness = Readiness(partial(handshake, engine_client))
        state.steering_uploads = Uploads(limits.max_upload_bytes, limits.max_uploads)
        state.steering_in_flight = partial(in_flight, engine_client)
        if frontend.armed:
            processor = engine_client.input_processor
            frontend.vocabulary = make_vocabulary(processor.tokenizer, engine_client.vllm_config, args.tool_call_parser)
            # The first reply may wait for the engine's first step; a probe's own timeout would be too short.
            await handshake(engine_client)
            await watch(engine_client)
            if frontend.default_preset is not None:
                frontend.resolve({"preset": frontend.default_preset})
            if frontend.model.bank_rows is not None:
                frontend.queue_limit = QueueLimit(partial(num_waiting, engine_client), limits.max_bank_queue)
            # Kept on the state: a task without a reference may be collected.
            state.steering_gauges = asyncio.create_task(refresh_gauges(state.steering_readiness, frontend.registry))
            state.steering_mirror = start_mirror(frontend.registry.directory)
            if getattr(args, "says_ready", False) and engine_client.vllm_config.parallel_config._api_process_rank == 0:
                from steer_engine.vllm.start_log import say_ready

                state.steering_ready = asyncio.create_task(say_ready(state, args))


def _admit_admin_keys(args: Namespace, admin_keys: list[str]) -> None:
    """Where vLLM asks for a key below `/v1`, an admin key is valid too; vLLM reads the list after this."""
    keys = inference_keys(args)
    if keys and admin_keys:
        args.api_key = keys + admin_keys


def inference_keys(args: Namespace) -> list[str]:
    """The keys that vLLM accepts below `/v1`; none if it asks for no key."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def hide_kernel_folder() -> bool:
    """Make `import triton_kernels` fail where it would find this repository's folder. True if this call hid it.

    vLLM asks whether the third-party package `triton_kernels` can be imported (0.32: when a fused-MoE model loads), and
    a folder of that name without `__init__.py` is enough for a yes. It then logs an error and disables its own MoE
    kernels. An install never makes the folder importable, but a process started in the repository root, and every child
    of it, has the root on `sys.path`. A real package is left alone.
    """
    spec = _kernel_spec()
    if spec is None or not _is_our_folder(spec):
        return False
    sys.modules[KERNEL_FOLDER] = None  # type: ignore[assignment]  # the documented way to block an import
    # vLLM caches its look-ups: a yes from before would make its next import of the name fail.
    import_utils = sys.modules.get("vllm.utils.import_utils")
    for cached in ("_has_module", "get_triton_kernels_version"):
        clear = getattr(getattr(import_utils, cached, None), "cache_clear", None)
        if clear is not None:
            clear()
    return True


def _kernel_spec() -> ModuleSpec | None:
    if KERNEL_FOLDER in sys.modules:
        return getattr(sys.modules[KERNEL_FOLDER], "__spec__", None)  # None once hidden
    return find_spec(KERNEL_FOLDER)


def _is_our_folder(spec: ModuleSpec) -> bool:
    """A namespace package (no file of its own) that holds `steer_kernels`."""
    return spec.origin is None and any(
        Path(folder, "steer_kernels", "__init__.py").is_file() for folder in spec.submodule_search_locations or ()
    )
