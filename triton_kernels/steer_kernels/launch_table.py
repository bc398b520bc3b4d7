"""Launch parameters by padded hidden size. They are fixed: autotuning would delay requests in a serving process.

One program covers a row in tiles (see `tiles`). A tile is the smallest size that gives every thread whole 16-byte
vectors in any dtype, for NVIDIA warps of 32 threads and AMD warps of 64: 64 threads * 8 elements = 512 per warp. The
number of warps doubles with D up to 8. A thread of an NVIDIA warp then has 16 elements of a row, or 32 at D = 8,192:
enough loads in flight to hide memory latency, while delta and a bank row in float32 stay far below 255 registers. At
D = 16,384 only delta fits; values needed twice are loaded twice, the second time from cache (`hold` is False).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

BACKEND: Final = "cuda" if torch.version.hip is None else "hip"
"""Backend on which this process launches kernels (or which it interprets)."""

MAX_HIDDEN_SIZE: Final = 16384

MAX_NORMED_BYTES: Final = 32768
"""Longest row for which `add_rms_norm_edit` does not spill: 16,384 items of 2 bytes or 8,192 of 4."""


class Launch(NamedTuple):
    tile: int
    """Elements of a tile: a power of two."""
    num_warps: int
    hold: bool
    """Keep values in registers that are used twice: the stream during adds, a bank row between sum and update."""

    def constants(self, hidden_size: int) -> dict[str, int | bool]:
        """Constants of a kernel that loops over the tiles of a row."""
        return {"D": hidden_size, "TILE": self.tile, "HOLD": self.hold}

    def options(self, backend: str) -> dict[str, int | bool]:
        """Launch options besides the kernel's arguments. backend: "cuda" or "hip".

        Fused multiply-add is off, so that products and sums round separately, as in the reference: c*w - c*w is then
        exactly 0. The kernels are limited by memory and would gain nothing from it.
        """
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        if backend == "cuda":
            # By default ptxas spills one or two registers to fit one more program on a multiprocessor.
            options["maxnreg"] = 255
        return options


# Padded D (a power of two) -> launch, for items of 2 and 4 bytes: both give whole vectors without spills.
LAUNCH_TABLE: Final[dict[int, Launch]] = {
    512: Launch(512, 1, True),
    1024: Launch(1024, 2, True),
    2048: Launch(2048, 4, True),
    4096: Launch(4096, 8, True),
    8192: Launch(4096, 8, True),
    16384: Launch(4096, 8, False),
}


def launch_for(hidden_size: int) -> Launch:
    """Launch parameters for rows of `hidden_size` elements. Raises ValueError above MAX_HIDDEN_SIZE."""
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden size {hidden_size} is not supported; the kernels support 1..{MAX_HIDDEN_SIZE}")
    return LAUNCH_TABLE[max(512, 1 << (hidden_size - 1).bit_length())]
