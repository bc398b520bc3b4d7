"""vLLM's own serving benchmark as a client. One process runs all benchmarks, to import vLLM only once."""

from __future__ import annotations

from typing import Any

from steer_bench.load import Load
from steer_bench.settings import Settings
from steer_bench.timing import Timing

ENVIRONMENT = {"VLLM_PLUGINS": ""}


def load(settings: Settings) -> Client:
    return Client(settings)


class Client:
    """Sends random prompts to a server, with the number of requests and the concurrency of a load."""

    def __init__(self, settings: Settings) -> None:
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._settings = settings
        self._serve = serve
        self._parser = FlexibleArgumentParser()
        serve.add_cli_args(self._parser)

    def describe(self) -> dict[str, Any]:
        return {"client": "vllm.benchmarks.serve"}

    def run(self, load: Load, *, check: bool = False) -> Timing:
        raise NotImplementedError("A client needs a server: use command('bench', url=...).")

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "bench":
            return self._bench(Load.from_json(arguments["load"]), arguments["url"], arguments["extra_body"])
        raise ValueError(f"This arm has no command {what!r}.")

    def _bench(self, load: Load, url: str, extra_body: dict[str, Any]) -> dict[str, Any]:
        """Timing of one run as JSON. Asserts that every request completed."""
        import asyncio

        length = (load.min_prompt + load.max_prompt) // 2
        given = {
            "--backend": "openai", "--base-url": url, "--endpoint": "/v1/completions", "--model": "bench",
            "--tokenizer": self._settings.model, "--dataset-name": "random", "--random-input-len": length,
            "--random-output-len": load.max_tokens, "--random-range-ratio": 0.3, "--num-prompts": load.num_requests,
            "--max-concurrency": load.concurrency, "--seed": load.seed,
        }  # fmt: skip
        words = [str(word) for pair in given.items() for word in pair]
        args = self._parser.parse_args([*words, "--ignore-eos", "--disable-tqdm"])
        args.extra_body = {"temperature": 0.0, **extra_body}
        result = asyncio.run(self._serve.main_async(args))
        assert result["completed"] == load.num_requests, result
        return Timing(
            seconds=result["duration"],
            output_tokens=result["total_output_tokens"],
            prompt_tokens=result["total_input_tokens"],
            ttft_ms=result["median_ttft_ms"],
            itl_ms=result["median_tpot_ms"],
        ).to_json()
