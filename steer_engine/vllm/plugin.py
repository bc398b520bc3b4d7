"""Keeps the repository's folder `triton_kernels/` from being taken for the third-party package of that name.

Wraps no symbol. vLLM asks `vllm.utils.import_utils.has_triton_kernels()` when its fused-MoE modules are imported (0.32:
at model load, after the general plugins), and an importable folder without `__init__.py` is enough for a yes: it then
logs an error and turns its own MoE kernels off. An install of ours never makes the folder importable, but a process
started in the repository root (`python -c`, `python -m`, a script there, and every child spawned from one) has the root
on `sys.path`.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_engine.errors import UnsupportedEngineError

_NAME = "triton_kernels"


def hide_kernel_folder() -> bool:
    """Make `import triton_kernels` fail where it would find our folder; leave a real package alone.

    True if this call hid it.
    """
    spec = _spec()
    if spec is None or not _is_our_folder(spec):
        return False
    sys.modules[_NAME] = None  # type: ignore[assignment]  # the documented way to block an import
    _forget_vllm_answers()
    return True


def _spec() -> ModuleSpec | None:
    if _NAME in sys.modules:
        return getattr(sys.modules[_NAME], "__spec__", None)  # None once hidden
    return find_spec(_NAME)


def _is_our_folder(spec: ModuleSpec) -> bool:
    """A namespace package (no file of its own) that holds `steer_kernels`."""
    return spec.origin is None and any(
        Path(folder, "steer_kernels", "__init__.py").is_file() for folder in spec.submodule_search_locations or ()
    )


def _forget_vllm_answers() -> None:
    """vLLM caches its look-ups; a yes from before the folder was hidden would make its next import of the name fail."""
    import_utils = sys.modules.get("vllm.utils.import_utils")
    for cached in ("_has_module", "get_triton_kernels_version"):
        clear = getattr(getattr(import_utils, cached, None), "cache_clear", None)
        if clear is not None:
            clear()


def log_with_vllm() -> None:
    """Hang the logger `steer_engine` below `vllm`, so that whatever vLLM sets up later holds for both."""
    logging.getLogger("steer_engine").parent = logging.getLogger("vllm")


def register() -> None:
    """Check vLLM's version and engine_symbols, then patch. Calling it again changes nothing.

    Raises:
        UnsupportedEngineError: this vLLM is not one that we know; names it, and what differs.
    """

    hide_kernel_folder()
    log_with_vllm()

    from vllm import __version__ as vllm_version

    from steer_engine.vllm import engine_symbols
    from steer_engine.vllm.patching import check_symbols

    check_symbols(engine_symbols.all_symbols(), vllm_version)
    for module in engine_symbols.MODULES:
        module.hook()

    register_serving()


def register_serving() -> None:
    """Called by the general plugin in every process."""
    from steer_engine.vllm import symbols
    from steer_engine.vllm.patching import wrap

    wrap(symbols.ASYNC_LLM_INIT, _init)


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        hook_serving()
        original(self, *args, **kwargs)

    return __init__


def hook_serving() -> None:
    """Check vLLM's API side and wrap it. Safe to call more than once.

    Raises:
        UnsupportedEngineError: this vLLM is not as expected; says what differs.
    """
    import vllm

    from steer_engine.vllm import check_model, endpoints, shutdown, symbols, told, tracing
    from steer_engine.vllm.patching import check_symbols

    check_symbols(symbols.ALL, vllm.__version__)
    for module in (check_model, tracing, shutdown):
        module.hook()
    for module in (told, endpoints):
        module.hook()


class SteerEndpointPlugin:
    """Loaded where `VLLM_PLUGINS` names `steer_engine`, which `steer-engine serve` does."""

    name = "steer_engine"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add our routes and the middleware; called once while vLLM builds its app, after all its own routes."""
        from steer_engine.api import registry_routes, routes
        from steer_engine.api.drain import Door
        from steer_engine.api.middleware import SteeringMiddleware
        from steer_engine.api.routes import document_field
        from steer_engine.api.routing import AdminKeys
        from steer_engine.settings import ApiLimits, EngineLimits

        app.include_router(routes.router)
        app.include_router(registry_routes.vector_router)
        app.include_router(registry_routes.preset_router)
        app.include_router(routes.playground_router)
        app.state.steering_api_limits = ApiLimits.from_environment()
        app.state.steering_engine_limits = EngineLimits.from_environment()
        app.state.steering_admin_keys = keys = AdminKeys.from_environment()
        app.state.steering_door = door = Door()
        app.add_middleware(SteeringMiddleware, max_body_bytes=app.state.steering_api_limits.max_body_bytes, door=door)
        document_field(app)
        _let_admins_in(app.state.args, keys.plain_keys())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Prove that every engine and worker is armed as this process is.

        Raises:
            UnsupportedEngineError, CapacityError: they are not; the server does not start.
        """
        import asyncio

        from steer_engine.api import background
        from steer_engine.api.background import QueueLength, Readiness, poll
        from steer_engine.api.registry_routes import Uploads
        from steer_engine.vllm.engine_client import handshake, in_flight, num_waiting

        frontend = getattr(getattr(engine_client, "input_processor", None), "steering", None)
        if frontend is None:
            raise UnsupportedEngineError(
                "The general plugin 'steer_engine' is not loaded in the API process; start with 'steer-engine serve', "
                "or name the plugin in VLLM_PLUGINS."
            )
        limits = state.steering_api_limits
        state.steering_frontend = frontend
        frontend.log_requests = bool(args.enable_log_requests)
        frontend.door = state.steering_door
        state.steering_readiness = Readiness(partial(handshake, engine_client))
        state.steering_uploads = Uploads(limits.max_upload_bytes, limits.max_uploads)
        state.steering_in_flight = partial(in_flight, engine_client)
        if frontend.armed:
            # The first answer may wait for the engine's first step; the probe's own timeout would be too short.
            await handshake(engine_client)
            if frontend.default_preset is not None:
                frontend.resolve({"preset": frontend.default_preset})
            if frontend.model.bank_rows is not None:
                frontend.queue_length = QueueLength(partial(num_waiting, engine_client), limits.max_bank_queue)
            # Kept on the state: a task that nothing refers to may be collected.
            state.steering_poll = asyncio.create_task(poll(state.steering_readiness, frontend.registry))
            state.steering_mirror = background.from_environment(frontend.registry.directory)


def _let_admins_in(args: Namespace, admin_keys: list[str]) -> None:
    """Where vLLM asks for a key below `/v1`, an admin key is one too; it reads the list after this."""
    inference_keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    if inference_keys and admin_keys:
        args.api_key = inference_keys + admin_keys
