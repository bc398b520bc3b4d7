"""Runs one program of a compiled kernel, all threads in step, and counts what it asks of memory.

No GPU is needed: the PTX of our kernels is some 90 instructions, uniform branches and one shared array. What is counted
are distinct bytes of distinct requests: 32 threads that read one word read 4 bytes; a masked lane reads none. An access
outside of the tensors given, an unknown instruction or a branch on which threads differ is an error.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Values = Any  # one NumPy value a thread

WARP = 32
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_REGISTER_BITS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}
_COMPARE: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


class Instruction(NamedTuple):
    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass
class Traffic:
    """What one program asked of one tensor."""

    loaded: int = 0
    stored: int = 0
    loaded_at: set[int] = field(default_factory=set)
    """Offsets of the bytes that were loaded, however often."""
    widths: set[int] = field(default_factory=set)
    """Bytes that a thread moves at once."""


def parse(ptx: str) -> tuple[list[str], list[Instruction], dict[str, int]]:
    """Parameters in order, instructions, and the instruction that each label stands before."""
    parameters = re.findall(r"\.param \.\w+ .*?(\w+_param_\d+)", ptx)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in ptx[ptx.index("\n{") + 2 :].splitlines():
        line = line.split("//")[0].strip()
        if label := re.match(r"(\$\w+):$", line):
            labels[label[1]] = len(instructions)
        elif line == "}":
            break
        elif match := _INSTRUCTION.match(line):
            negated, guard, opcode, operands = match.groups()
            parts = tuple(part.strip() for part in _OPERAND.findall(operands))
            instructions.append(Instruction(guard, negated == "!", tuple(opcode.split(".")), parts))
        else:
            assert not line or line.startswith("."), f"unknown line {line!r}"
    return parameters, instructions, labels


class Machine:
    """The threads of one program: registers, shared memory, and tensors as global memory."""

    def __init__(self, ptx: str, arguments: Sequence[torch.Tensor | int | float]) -> None:
        """arguments: in the order of the kernel's parameters, without its constants; Triton's own two come as 0."""
        names, self._instructions, self._labels = parse(ptx)
        self._parameters = dict(zip(names, [*arguments, 0, 0], strict=True))
        self._num_threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
        self._tensors = {a.data_ptr(): a for a in arguments if isinstance(a, torch.Tensor)}
        self._bytes = {at: _byte_view(tensor) for at, tensor in self._tensors.items()}

    def run(self, program: int) -> dict[int, Traffic]:
        """Runs program `program` of the grid; traffic by the address of the tensor."""
        self._registers: dict[str, Values] = {}
        self._shared = np.zeros(64 * 1024, dtype=np.uint8)
        self._traffic: dict[int, Traffic] = defaultdict(Traffic)
        self._program = program
        at = 0
        while at < len(self._instructions):
            instruction = self._instructions[at]
            active = np.ones(self._num_threads, dtype=bool)
            if instruction.guard:
                active = self._registers[instruction.guard] ^ instruction.negated
            at += 1
            if instruction.opcode[0] == "ret":
                break
            if instruction.opcode[0] == "bra":
                assert active.all() or not active.any(), "threads of one program part ways"
                at = self._labels[instruction.operands[0]] if active.all() else at
            elif instruction.opcode[0] != "bar":
                self._execute(instruction, active)
        return dict(self._traffic)

    # Operands

    def _read(self, operand: str, dtype: Any) -> Values:
        dtype = np.dtype(dtype)
        if operand.startswith("{"):
            names = [part.strip() for part in operand[1:-1].split(",")]
            # The compiler leaves the unused half of a pair undefined.
            names = [name if name in self._registers or name[0] != "%" else "0" for name in names]
            parts = [self._read(name, f"u{dtype.itemsize // 2}") for name in names]
            return np.ascontiguousarray(np.stack(parts, axis=1)).view(dtype)[:, 0]
        if operand in self._registers:
            value = self._registers[operand]
            return value if value.dtype == dtype else np.ascontiguousarray(value).view(dtype)
        if operand == "%tid.x":
            number: Any = np.arange(self._num_threads)
        elif operand == "%ctaid.x":
            number = self._program
        elif operand == "global_smem":
            number = 0
        elif match := re.match(r"0f([0-9A-F]{8})$", operand):
            return self._every(np.uint32(int(match[1], 16))).view(dtype)
        else:
            number = int(operand, 0)
        if dtype.kind == "b":
            return self._every(bool(number))
        return self._every(np.asarray(number, dtype=np.int64)).astype(f"u{dtype.itemsize}").view(dtype)

    def _every(self, value: Any) -> Values:
        return np.array(np.broadcast_to(value, (self._num_threads,)))

    def _write(self, operand: str, value: Values, active: Values) -> None:
        if operand.startswith("{"):
            parts = [part.strip() for part in operand[1:-1].split(",")]
            pieces = np.ascontiguousarray(value).view(f"u{value.itemsize // len(parts)}").reshape(-1, len(parts))
            for i, part in enumerate(parts):
                self._write(part, pieces[:, i], active)
            return
        if operand == "_":
            return
        bits = _REGISTER_BITS[re.match(r"%[a-z]+", operand)[0]]  # type: ignore[index]
        value = value if bits == 1 else np.ascontiguousarray(value).view(f"u{bits // 8}")
        old = self._registers.get(operand, np.zeros_like(value))
        self._registers[operand] = np.where(active, value, old)

    # Instructions

    def _execute(self, instruction: Instruction, active: Values) -> None:
        name, *modifiers = instruction.opcode
        if name in ("ld", "st"):
            self._access(name, modifiers, instruction.operands, active)
            return
        if name == "red":
            self._reduce(modifiers, instruction.operands, active)
            return
        target, *sources = instruction.operands
        with np.errstate(all="ignore"):
            self._write(target, self._compute(name, modifiers, sources), active)

    def _compute(self, name: str, modifiers: list[str], sources: list[str]) -> Values:
        kind = modifiers[-1]
        if name == "setp":
            return self._compare(modifiers[0], kind, sources)
        if name == "selp":
            a, b = (self._read(source, _dtype(kind)) for source in sources[:2])
            return np.where(self._read(sources[2], bool), a, b)
        if name == "cvt":
            return self._convert(modifiers, sources)
        if name == "shfl":
            return self._shuffle(modifiers[1], sources)
        if name == "redux":
            value = self._read(sources[0], _dtype(kind)).reshape(-1, WARP)
            return np.repeat(_REDUCTIONS[modifiers[1]].reduce(value, axis=1), WARP)
        if name == "bfe":
            value, first, count = (self._read(source, np.uint32) for source in sources)
            return (value >> first) & ((np.uint32(1) << count) - np.uint32(1))
        if name in ("mul", "mad") and modifiers[0] == "wide":
            wide = "i8" if kind[0] == "s" else "u8"
            a, b = (self._read(source, _dtype(kind)).astype(wide) for source in sources[:2])
            return a * b if name == "mul" else a * b + self._read(sources[2], wide)
        if name == "mul" and modifiers[0] == "hi":
            a, b = (self._read(source, _dtype(kind)).astype("i8") for source in sources)
            return ((a * b) >> 32).astype(_dtype(kind))
        if kind.endswith("x2"):  # two floats in a 64-bit register
            a, b = (self._read(source, np.uint64).view(np.float32) for source in sources)
            return _arithmetic(name, [a, b]).view(np.uint64)
        if "f32" in modifiers and kind in ("bf16", "f16"):  # add.rn.f32.bf16: a narrow first operand
            return _arithmetic(name, [self._widen(sources[0], kind), self._read(sources[1], np.float32)])
        return _arithmetic(name, [self._read(source, _dtype(kind)) for source in sources])

    def _compare(self, relation: str, kind: str, sources: list[str]) -> Values:
        a, b = (self._read(source, _dtype(kind)) for source in sources)
        if len(relation) == 3:  # gtu, leu, ...: also true of NaN
            return _COMPARE[relation[:2]](a, b) | np.isnan(a) | np.isnan(b)
        return _COMPARE[relation](a, b)

    def _widen(self, source: str, kind: str) -> Values:
        bits = self._read(source, np.uint16)
        return bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view("f4")

    def _convert(self, modifiers: list[str], sources: list[str]) -> Values:
        target, source = modifiers[-2:]
        if target.endswith("x2"):  # the first operand becomes the upper half
            upper, lower = (_narrow(self._read(operand, np.float32), target[:-2]) for operand in sources)
            return np.ascontiguousarray(np.stack([lower, upper], axis=1)).view(np.uint32)[:, 0]
        if source == "f32" and target in ("f16", "bf16"):
            return _narrow(self._read(sources[0], np.float32), target)
        if source in ("bf16", "f16"):
            return self._widen(sources[0], source)
        return self._read(sources[0], _dtype(source)).astype(_dtype(target))

    def _shuffle(self, mode: str, sources: list[str]) -> Values:
        """Each thread gets the value of another lane of its warp, or its own if there is no such lane."""
        value = self._read(sources[0], np.uint32)
        thread = np.arange(self._num_threads)
        lane, other = thread % WARP, self._read(sources[1], np.int32).astype(np.int64)
        taken = {"bfly": lane ^ other, "up": lane - other, "idx": other}[mode]
        return value[thread - lane + np.where((taken >= 0) & (taken < WARP), taken, lane)]

    def _reduce(self, modifiers: list[str], operands: tuple[str, ...], active: Values) -> None:
        """An atomic operation without a result: one thread after the other."""
        relation, kind = modifiers[-2], _dtype(modifiers[-1])
        base, _, offset = operands[0][1:-1].replace(" ", "").partition("+")
        where = self._read(base, np.uint64).astype(np.int64) + int(offset or 0)
        memory, starts = self._find("red", where, kind.itemsize, active)
        value = self._read(operands[1], kind)
        for thread in np.flatnonzero(active):
            place = memory[starts[thread] : starts[thread] + kind.itemsize].view(kind)
            place[0] = _REDUCTIONS[relation](place[0], value[thread])

    def _access(self, name: str, modifiers: list[str], operands: tuple[str, ...], active: Values) -> None:
        space, kind = modifiers[0], _dtype(modifiers[-1])
        register, address = operands if name == "ld" else reversed(operands)
        base, _, offset = address[1:-1].replace(" ", "").partition("+")
        if space == "param":
            self._write(register, self._every(_parameter_bits(self._parameters[base])).astype(kind), active)
            return
        parts = [part.strip() for part in register.strip("{}").split(",")]
        lanes = int(modifiers[1][1:]) if len(modifiers) == 3 else 1
        width = lanes * kind.itemsize
        where = self._read(base, np.uint32 if space == "shared" else np.uint64).astype(np.int64) + int(offset or 0)
        memory, starts = (self._shared, where) if space == "shared" else self._find(name, where, width, active)
        index = starts[:, None] + np.arange(width)
        if name == "st":
            value = np.stack([self._read(part, kind) for part in parts], axis=1)
            memory[index[active]] = np.ascontiguousarray(value).view(np.uint8)[active]
        else:
            loaded = np.zeros((self._num_threads, width), dtype=np.uint8)
            loaded[active] = memory[index[active]]
            value = loaded.view(kind)
            for i, part in enumerate(parts):
                self._write(part, value[:, i].copy(), active)

    def _find(self, name: str, where: Values, width: int, active: Values) -> tuple[Values, Values]:
        """The bytes of the tensor that the active threads access, and their offsets in it."""
        if not active.any():
            return self._shared, where
        first = where[active].min()
        start = max((at for at in self._bytes if at <= first), default=None)
        assert start is not None, "an access below every tensor"
        memory, offsets = self._bytes[start], where - start
        assert offsets[active].max() + width <= len(memory), "an access beyond its tensor"
        assert not (offsets[active] % width).any(), "a misaligned access"
        traffic = self._traffic[start]
        moved = len(np.unique(offsets[active])) * width
        traffic.loaded += moved if name == "ld" else 0
        traffic.stored += moved if name == "st" else 0
        if name == "ld":
            traffic.loaded_at.update((offsets[active][:, None] + np.arange(width)).ravel().tolist())
        traffic.widths.add(width)
        return memory, offsets


def _parameter_bits(value: torch.Tensor | int | float) -> int:
    """A kernel's argument as the driver hands it over: an address, a whole number or the bits of a float32."""
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return value if isinstance(value, int) else value.data_ptr()


def _byte_view(tensor: torch.Tensor) -> Values:
    """The bytes of a contiguous tensor, sharing memory."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _dtype(kind: str) -> np.dtype[Any]:
    """f32, s64, u16, b32, pred, ... as NumPy has it."""
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype({"f": "f", "s": "i", "u": "u", "b": "u"}[kind[0]] + str(int(kind[1:]) // 8))


def _narrow(value: Values, kind: str) -> Values:
    """float32 to the bits of float16 or bfloat16, to the nearest, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    return torch.from_numpy(value).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


_REDUCTIONS: Mapping[str, np.ufunc] = {"add": np.add, "max": np.maximum, "min": np.minimum}

_OPERATIONS: Mapping[str, Callable[..., Values]] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "ex2": np.exp2,
    "min": np.fmin,
    "max": np.fmax,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "shl": lambda a, b: a << (b & np.array(63, dtype=b.dtype)),
    "shr": lambda a, b: a >> (b & np.array(63, dtype=b.dtype)),
}


def _arithmetic(name: str, operands: list[Values]) -> Values:
    return _OPERATIONS[name](*operands)
