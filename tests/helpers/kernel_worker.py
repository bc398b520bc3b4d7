"""A process that calls kernels for the tests, since TRITON_INTERPRET is read once, when Triton is imported.

Reads pickled (function, args, kwargs) from standard input, each with its length before it, and answers
("ok", (result, args)) or ("error", traceback). `args` come back because kernels write into them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import struct
import sys
import traceback
from typing import Any, BinaryIO

LENGTH = struct.Struct("=Q")


def send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError("the other process has ended")
    return pickle.loads(stream.read(LENGTH.unpack(header)[0]))


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Triton or a compiler prints must not end up among the answers
    while True:
        try:
            name, args, kwargs = receive(sys.stdin.buffer)
        except EOFError:
            return
        module, _, function = name.rpartition(".")
        try:
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            answer = ("ok", (result, args))
        except Exception:
            answer = ("error", traceback.format_exc())
        send(answers, answer)


if __name__ == "__main__":
    main()
