"""Resource use of a compiled kernel (memory accesses, registers, spills), parsed from the compiler's output."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel

_NVIDIA: Final = re.compile(r"\b(ld|st)\.global\.(?:v(\d)\.)?b(\d+)\b")
_AMD: Final = re.compile(r"\b(global|buffer)_(load|store)_[us]?(dwordx\d|dword|short|byte)")
_AMD_BYTES: Final = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
_NEW_BLOCK: Final = re.compile(r"^(?:[\w.$]*BB\d+_\d+:|\s*(?:@!?%p\d+\s+)?bra\b|\s*s_c?branch)")
_LINE: Final = re.compile(r"\.loc\s(.*?)(?://|;)\s*(.*)")


class Access(NamedTuple):
    """The loads or stores compiled from one source location."""

    is_store: bool
    of_a_row: bool
    """True for a tile of the stream, the bank or the captured rows; False for a number of the tables."""
    place: str
    """file:line:column and where it was inlined, in the compiler's notation."""
    width: int
    """Bytes per thread and instruction."""
    instructions: int
    """Instructions per execution. Copies from loop unrolling are counted once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A kernel compiled for one target."""

    text: str
    """PTX, or AMD assembly."""
    num_threads: int
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Stack and local memory per thread; 0 if the registers suffice."""
    shared_bytes: int
    accesses: tuple[Access, ...]

    def row_bytes(self, hidden_size: int, itemsize: int, tile: int) -> int:
        """Bytes of row data that a program moves if each source location runs once. Lanes beyond D are not counted.

        Raises AssertionError unless every source location accesses each of its lanes exactly once.
        """
        lanes = -(-hidden_size // tile) * tile
        total = 0
        for access in filter(lambda access: access.of_a_row, self.accesses):
            moved = access.instructions * access.width * self.num_threads
            assert moved == lanes * itemsize, f"{access} moves {moved} bytes for {lanes} lanes of {itemsize}"
            total += hidden_size * itemsize
        return total


def inspect(kernel: CompiledKernel) -> Artifact:
    """Parse the compiler's output for `kernel`."""
    num_threads = kernel.metadata.num_warps * kernel.metadata.warp_size
    if kernel.metadata.target.backend == "cuda":
        text: str = kernel.asm["ptx"]
        usage = _resource_usage(kernel.asm["cubin"])
        registers, spilled, shared = usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared
    else:
        text = kernel.asm["amdgcn"]
        registers = _amd_number(text, "vgpr_count")
        spilled = _amd_number(text, "private_segment_fixed_size")
        spilled += 4 * (_amd_number(text, "vgpr_spill_count") + _amd_number(text, "sgpr_spill_count"))
        shared = _amd_number(text, "group_segment_fixed_size")
    return Artifact(
        text=text,
        num_threads=num_threads,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        accesses=tuple(_accesses(text.splitlines())),
    )


def _resource_usage(cubin: bytes) -> Mapping[str, int]:
    """REG, STACK, SHARED, LOCAL, ... as reported by `cuobjdump`, which Triton includes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    function = report[report.index("Function ") :]
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", function)}


def _amd_number(text: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", text)
    assert match, f"the assembly has no {name}"
    return int(match[1])


def _accesses(lines: Iterable[str]) -> Iterable[Access]:
    block, place = 0, ""
    found: dict[tuple[bool, bool, str, int], Counter[int]] = defaultdict(Counter)
    for line in lines:
        if location := _LINE.search(line):
            numbers = re.sub(r"\s*(?:is_stmt \d|prologue_end)", "", location[1]).strip()
            place = f"{location[2].strip()} ({numbers})"
        elif _NEW_BLOCK.match(line):
            block += 1
        elif match := _NVIDIA.search(line):
            width = int(match[2] or 1) * int(match[3]) // 8
            found[match[1] == "st", place.startswith("tiles.py"), place, width][block] += 1
        elif match := _AMD.search(line):
            # LLVM drops the line of an instruction that it moves to another block. Only tiles become buffer accesses.
            of_a_row = place.startswith("tiles.py") or match[1] == "buffer"
            found[match[2] == "store", of_a_row, place, _AMD_BYTES[match[3]]][block] += 1
    for (is_store, of_a_row, where, width), blocks in found.items():
        yield Access(is_store, of_a_row, where, width, max(blocks.values()))
