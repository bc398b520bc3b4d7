"""Process of an arm: loads the arm, then runs the commands of the parent process. Each is one line of JSON.

    python -P -m steer_bench.child ARM SETTINGS

Standard output is reserved for replies. Output of the arm goes to standard error, which the parent saves as a log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from typing import Any, TextIO

from steer_bench.load import Load
from steer_bench.settings import Settings


def main(arm_name: str, settings: str) -> None:
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = import_module(f"steer_bench.arms.{arm_name}")
    start = time.perf_counter()
    try:
        arm = module.load(Settings(**json.loads(settings)))
        seconds = time.perf_counter() - start
        _send(protocol, {"ok": True, "value": {"start_up_s": seconds, **arm.describe()}})
    except Exception:
        _send(protocol, {"ok": False, "reason": traceback.format_exc(limit=-3)})
        return
    for line in sys.stdin:
        try:
            _send(protocol, {"ok": True, "value": _run_command(arm, json.loads(line))})
        except Exception:
            _send(protocol, {"ok": False, "reason": traceback.format_exc(limit=-3)})


def _run_command(arm: Any, command: dict[str, Any]) -> Any:
    if command["do"] == "run":
        return arm.run(Load.from_json(command["load"]), check=command["check"]).to_json()
    if command["do"] == "profile":
        from steer_bench.arms.profiled import profiled

        return profiled(arm, Load.from_json(command["load"]))
    return arm.command(command["do"], **command["arguments"])


def _send(protocol: TextIO, reply: dict[str, Any]) -> None:
    protocol.write(json.dumps(reply) + "\n")
    protocol.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    sys.stderr.flush()
    # Threads of the engine may never end.
    os._exit(0)
