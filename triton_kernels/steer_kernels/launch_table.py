"""Launch parameters by padded hidden size: fixed, because autotuning has no place in a serving process.

One program covers a row in tiles (see `tiles`). A tile is the least that gives every thread whole 16-byte vectors in
any dtype, on NVIDIA's warps of 32 threads and on AMD's of 64: 64 threads * 8 elements = 512 a warp. Warps double with D
until 8, where a thread of an NVIDIA warp holds 16 elements of a row, or 32 at D = 8,192: enough loads in flight to
cover the latency of memory, while delta and a bank row in float32 stay far under 255 registers. At 16,384 only delta
fits, and what is needed twice is read twice, from cache (`hold`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

BACKEND: Final = "cuda" if torch.version.hip is None else "hip"
"""What this process launches on (or interprets for)."""

MAX_HIDDEN_SIZE: Final = 16384

MAX_NORMED_BYTES: Final = 32768
"""The longest row that `add_rms_norm_edit` takes without spilling: 16,384 items of 2 bytes or 8,192 of 4."""


class Launch(NamedTuple):
    tile: int
    """Elements of a tile: a power of two."""
    num_warps: int
    hold: bool
    """Keep in registers what is needed again: the stream before adds, a bank row between a sum and its update."""

    def constants(self, hidden_size: int) -> dict[str, int | bool]:
        """The constants of a kernel that walks a row in tiles."""
        return {"D": hidden_size, "TILE": self.tile, "HOLD": self.hold}

    def options(self, backend: str) -> dict[str, int | bool]:
        """What to launch with beside the kernel's own arguments; backend: "cuda" or "hip".

        Products and sums round one by one, as they do in the reference: c*w - c*w is 0 then, which it isn't with a
        fused multiply-add, and a kernel that waits for memory gains nothing from one.
        """
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        if backend == "cuda":
            # Left alone, ptxas spills a register or two so that one more program fits on a multiprocessor.
            options["maxnreg"] = 255
        return options


# Padded D (a power of two) -> launch. Items of 2 and of 4 bytes take the same: both give whole vectors without spills.
LAUNCH_TABLE: Final[dict[int, Launch]] = {
    512: Launch(512, 1, True),
    1024: Launch(1024, 2, True),
    2048: Launch(2048, 4, True),
    4096: Launch(4096, 8, True),
    8192: Launch(4096, 8, True),
    16384: Launch(4096, 8, False),
}


def launch_for(hidden_size: int) -> Launch:
    """The launch of a row of `hidden_size` elements. Raises ValueError above MAX_HIDDEN_SIZE."""
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden size {hidden_size} is not in 1..{MAX_HIDDEN_SIZE}, which is what the kernels cover")
    return LAUNCH_TABLE[max(512, 1 << (hidden_size - 1).bit_length())]
