"""Steer Engine: `steer_engine.LLM` with all blocks and all operations armed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from steer_bench.arms.drive import drive
from steer_bench.arms.stock import engine_facts, sampling
from steer_bench.load import Load, Steering, rows, vector
from steer_bench.settings import Settings
from steer_bench.timing import Timing

ENVIRONMENT: dict[str, str] = {}
ADD_SCALE = 8.0
RELATIVE_SCALE = 0.02
NUM_PROBES = 4
NUM_ROWS = 4
"""Features, or ranks, of an edit."""
ROW_SETS = 8
"""Files of features, and low-rank edits, that a load uses in rotation."""


def load(settings: Settings) -> Ours:
    from steer_engine import LLM

    return Ours(LLM(settings.model, **settings.engine_args()), settings.num_vectors)


class Ours:
    """An armed engine in this process. Number 3 has the names `v3`, `features3` and `low_rank3`."""

    def __init__(self, llm: Any, num_vectors: int) -> None:
        from steer_engine import ControlVector
        from steer_engine.vectors.row_set import RowSet

        self.llm = llm
        self.engine = llm.llm_engine
        self.digests = {}
        for number in range(num_vectors):
            rows_LD = vector(number, llm.num_blocks, llm.hidden_size)
            made = ControlVector(directions=dict(enumerate(rows_LD)))
            llm.vectors.add(f"v{number}", made)
            self.digests[number] = made.digest
        for number in range(ROW_SETS):
            read, write = rows(number, NUM_ROWS, llm.hidden_size)
            blocks = range(llm.num_blocks)
            for kind in ("features", "low_rank"):
                made_rows = RowSet(kind=kind, read=dict.fromkeys(blocks, read), write=dict.fromkeys(blocks, write))
                llm.vectors.add(f"{kind}{number}", made_rows)

    def describe(self) -> dict[str, Any]:
        import torch

        import steer_engine
        from steer_engine.spec import Op

        worker = self.llm.steering_status()["workers"][0]
        facts = ("runner", "kernel", "armed_blocks", "ops", "bank_rows", "table_bytes")
        return {
            "steer_engine": steer_engine.__version__,
            "num_blocks": self.llm.num_blocks,
            "threads": torch.get_num_threads(),
            **engine_facts(self.engine),
            "all_ops": list(Op),
            **{fact: worker[fact] for fact in facts},
        }

    def params(self, load: Load, check: bool) -> list[Any]:
        """Sampling parameters of each request."""
        from vllm import SamplingParams

        made = []
        prompts = load.prompts(self.engine.vllm_config.model_config.get_vocab_size())
        for request, prompt in enumerate(prompts):
            spec = self.spec(load, request, prompt)
            extra = {} if spec is None else {"extra_args": {"steering": spec}}
            made.append(SamplingParams(**sampling(load, check), **extra))
        return made

    def spec(self, load: Load, request: int, prompt: list[int]) -> dict[str, Any] | None:
        """The `steering` field of a request with the tokens `prompt`; None = not steered."""
        number = load.vector_of(request)
        if number is None:
            return None
        probes = self.probes(load, number) if load.steering in (Steering.PROBES, Steering.PROBED_ADDS) else {}
        edits = {"edits": [self.edit(load, request, prompt, number)]} if load.ops else {}
        return {**edits, **probes}

    def edit(self, load: Load, request: int, prompt: list[int], number: int) -> dict[str, Any]:
        """The edit of a request with vector `number`."""
        op = load.op_of(request)
        edit: dict[str, Any] = {"vector": f"v{number}", "op": op, "scope": load.scope, "blocks": load.blocks}
        match op:
            case "add":
                edit["scale"] = ADD_SCALE
            case "add_relative":
                edit["scale"] = RELATIVE_SCALE
            case "clamp":
                edit |= {"lo": 2.0, "hi": 4.0}
            case "feature":
                edit |= {"vector": f"features{number % ROW_SETS}", "feature": list(range(NUM_ROWS)), "target": 1.0}
            case "low_rank":
                edit |= {"vector": f"low_rank{number % ROW_SETS}", "scale": 0.5}
            case "rotate":
                edit |= {"toward": f"v{number + 1}", "degrees": 60}
        match load.steering:
            case Steering.TRIGGERS:
                edit["scope"] = {"after": prompt[1], "until": prompt[1] + 1, "each": True}
            case Steering.CONDITIONS:
                edit["when"] = {"vector": f"v{number}", "blocks": 0, "above": -1.0, "at": "mean_prompt"}
            case Steering.SCHEDULES:
                edit["schedule"] = {"kind": "linear", "over": 64, "to": 0.5}
        return edit

    def probes(self, load: Load, number: int) -> dict[str, Any]:
        """The probes of a request, with vectors other than `number`."""
        names = [f"v{number + 1 + probe}" for probe in range(NUM_PROBES)]
        return {
            "probes": [{"name": name, "vector": name, "blocks": load.probe_blocks, "measure": "dot"} for name in names]
        }

    def run(self, load: Load, *, check: bool = False) -> Timing:
        prompts = load.prompts(self.engine.vllm_config.model_config.get_vocab_size())
        params = self.params(load, check)
        return drive(self.engine, load, prompts, params, inspect=self._applied if check else None)

    def _applied(self) -> dict[str, Any]:
        """Steering state in the engine core and the worker for the running requests."""
        core = self.engine.engine_core.engine_core
        named = [
            (request.sampling_params.extra_args or {}).get("_steer_program", {}).get("vectors", [])
            for request in core.scheduler.requests.values()
        ]
        worker = self.llm.steering_status()["workers"][0]
        return {
            "requests": len(named),
            "steered": sum(bool(vectors) for vectors in named),
            "digests": sorted({digest for vectors in named for digest in vectors}),
            "steered_slots": worker["steered_slots"],
            "bank_rows_pinned": worker["bank_rows_pinned"],
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "reset_prefix_cache":
            return self.engine.reset_prefix_cache()
        if what == "digests":
            return [self.digests[number] for number in range(arguments["num_vectors"])]
        if what == "host_time":
            from steer_bench.arms.host_time import host_time

            return host_time(self, Load.from_json(arguments["load"]))
        if what == "register":
            return self._register(arguments["number"])
        if what == "submitting":
            return self._submitting(arguments["num_requests"])
        raise ValueError(f"This arm has no command {what!r}.")

    def _register(self, number: int) -> float:
        """Seconds to register a new vector and ship it to the worker."""
        from steer_engine import ControlVector
        from steer_engine.vllm.engine_client import ship_sync

        rows_LD: np.ndarray = vector(number, self.llm.num_blocks, self.llm.hidden_size)
        start = time.perf_counter()
        made = ControlVector(directions=dict(enumerate(rows_LD)))
        self.llm.vectors.add(f"v{number}", made)
        resolved = self.engine.input_processor.steering.resolve({"edits": [{"vector": made.digest}]})
        ship_sync(self.engine, resolved)
        return time.perf_counter() - start

    def _submitting(self, num_requests: int) -> dict[str, float]:
        """Median microseconds of `add_request`: unsteered, with a named vector, and with an inline vector."""
        from vllm import SamplingParams

        vectors = {number: self._inline(number) for number in range(2)}
        taken: dict[str, list[float]] = {}
        for request in range(num_requests):
            inline = {"data": vectors[request % 2]}
            for kind, named in (("unsteered", None), ("named", f"v{request % len(self.digests)}"), ("inline", inline)):
                spec = {"steering": {"edits": [{"vector": named, "scale": ADD_SCALE}]}} if named else None
                params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=spec)
                start = time.perf_counter()
                self.engine.add_request(f"{kind}-{request}", {"prompt_token_ids": [1, 2, 3]}, params)
                taken.setdefault(kind, []).append(time.perf_counter() - start)
            while self.engine.has_unfinished_requests():
                self.engine.step()
        return {kind: 1e6 * float(np.median(times)) for kind, times in taken.items()}

    def _inline(self, number: int) -> str:
        """An inline vector for all blocks, base64-encoded as in a client's request."""
        import base64

        from steer_engine import ControlVector
        from steer_engine.vectors import safetensors_format

        rows_LD = vector(200_000 + number, self.llm.num_blocks, self.llm.hidden_size)
        made = ControlVector(directions=dict(enumerate(rows_LD)))
        return base64.b64encode(safetensors_format.to_bytes(made)).decode()
