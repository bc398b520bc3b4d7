"""Writes generated questions for the lm-eval tasks in this folder, one JSON object per line.

python examples/lm_eval/items.py 200 > examples/lm_eval/babi15.jsonl
"""

from __future__ import annotations

import json
import sys

from steer_engine.evaluate.tasks import Sizes, load_task


def main(count: int) -> None:
    for item in load_task("babi15", Sizes(test=count)).test:
        print(json.dumps({"prompt": item.prompt, "answers": item.answers, "correct": item.correct}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
