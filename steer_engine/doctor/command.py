"""`steer-engine doctor MODEL [--json] [--memory-only] [any flag of serve]`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from rich.console import Console


def doctor(argv: Sequence[str]) -> int:
    """Examine and print. Returns the exit status: 0 if the model can be served steered, else 1.

    argv: everything after `steer-engine doctor`.
    """
    parser = argparse.ArgumentParser(
        prog="steer-engine doctor",
        usage="steer-engine doctor MODEL [--json] [--memory-only] [any flag of steer-engine serve]",
        description="Say whether a model can be served steered with the flags given, how, what memory that takes, and "
        "if not, why. MODEL is a packaged model, a path or a Hugging Face id; of a large one a small copy with random "
        "weights is started. Ends with 1 if the server would refuse to start.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    parser.add_argument(
        "--memory-only", action="store_true", help="read the configuration and start nothing: a config.json will do"
    )
    own, of_serve = parser.parse_known_args(argv)
    if not of_serve:
        parser.error("MODEL is missing")
    # Before vLLM is imported. It logs to the standard output, where only the diagnosis belongs.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

    from steer_engine.doctor.examination import examine
    from steer_engine.doctor.show import show

    diagnosis = examine(of_serve, probe=not own.memory_only)
    if own.json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        show(diagnosis, Console(highlight=False))
    return 0 if diagnosis.serves else 1
