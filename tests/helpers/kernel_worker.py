"""A process that calls kernels for the tests, since TRITON_INTERPRET is read once, when Triton is imported.

Reads pickled (function, args, kwargs) from standard input, each with its length before it, and answers
("ok", (result, args)) or ("error", traceback). `args` come back because kernels write into them. With
STEER_KERNEL_DEVICE, the call gets copies of all tensors on that device.
"""

from __future__ import annotations

import dataclasses
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


def moved(value: Any, device: str) -> Any:
    """A copy on `device` of a tensor or of a dataclass of tensors; any other value as it is."""
    import torch

    if isinstance(value, torch.Tensor):
        # With its strides: a slice of a wider buffer stays one.
        there = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return there.copy_(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: moved(getattr(value, name), device) for name in names})
    return value


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
            call = getattr(importlib.import_module(module), function)
            device = os.environ.get("STEER_KERNEL_DEVICE")
            if device:
                there = [moved(each, device) for each in args]
                result, args = call(*there, **kwargs), [moved(each, "cpu") for each in there]
            else:
                result = call(*args, **kwargs)
            answer = ("ok", (result, args))
        except Exception:
            answer = ("error", traceback.format_exc())
        send(answers, answer)


if __name__ == "__main__":
    main()
