"""The process of an arm: loads it, then answers the commands of its parent, one JSON line each.

    python -P -m steer_bench.child ARM SETTINGS

Standard output belongs to the protocol; what the arm prints goes to standard error, which the parent keeps as a log.
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
        _say(protocol, {"ok": True, "value": {"start_up_s": seconds, **arm.describe()}})
    except Exception:
        _say(protocol, {"ok": False, "reason": traceback.format_exc(limit=-3)})
        return
    for line in sys.stdin:
        try:
            _say(protocol, {"ok": True, "value": _answer(arm, json.loads(line))})
        except Exception:
            _say(protocol, {"ok": False, "reason": traceback.format_exc(limit=-3)})


def _answer(arm: Any, command: dict[str, Any]) -> Any:
    if command["do"] == "run":
        return arm.run(Load.from_json(command["load"]), check=command["check"]).to_json()
    if command["do"] == "profile":
        from steer_bench.arms.profiled import profiled

        return profiled(arm, Load.from_json(command["load"]))
    return arm.ask(command["do"], **command["arguments"])


def _say(protocol: TextIO, reply: dict[str, Any]) -> None:
    protocol.write(json.dumps(reply) + "\n")
    protocol.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    sys.stderr.flush()
    # An engine in this process may keep threads that never end.
    os._exit(0)
