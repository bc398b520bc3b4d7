"""Runs `steer-engine doctor` several times in one process, which imports vLLM once.

    python examinations.py OUT.json [[arguments of a run], ...]   (as JSON)

OUT: for each run [exit status, standard output].
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path


def main() -> None:
    from steer_engine.cli.doctor import doctor

    found = []
    for argv in json.loads(sys.argv[2]):
        with redirect_stdout(io.StringIO()) as printed:
            status = doctor(argv)
        found.append([status, printed.getvalue()])
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
