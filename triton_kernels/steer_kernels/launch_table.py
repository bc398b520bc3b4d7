"""Launch parameters by padded hidden size and itemsize: fixed, because autotuning has no place in a serving process.

One program holds a whole row in registers. The number of warps is the least that keeps a thread at no more than 32
elements (the general kernel holds the row, the delta and a bank row in float32: 3 * 32 registers, with room under
the limit of 128 that 16 warps leave), and never so many that a thread would hold fewer than one 16-byte vector:
BLOCK >= warps * threads of a warp * 16 / itemsize, with the 64 threads of an AMD warp. D that is no power of two is
padded to one: the lanes above D load and store nothing, and the kernel waits for memory, not for lanes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_HIDDEN_SIZE: Final = 16384


class Launch(NamedTuple):
    block: int
    """Elements a program covers: a power of two >= D."""
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What to launch with beside the kernel's own arguments.

        Products and sums round one by one, as they do in the reference: c*w - c*w is 0 then, which it isn't with a
        fused multiply-add, and a kernel that waits for memory gains nothing from one.
        """
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


# (padded D, itemsize) -> launch. Below 512 a row is one vector a thread of one warp, or less.
LAUNCH_TABLE: Final[dict[tuple[int, int], Launch]] = {
    (512, 2): Launch(512, 1),
    (512, 4): Launch(512, 1),
    (1024, 2): Launch(1024, 2),
    (1024, 4): Launch(1024, 2),
    (2048, 2): Launch(2048, 4),
    (2048, 4): Launch(2048, 4),
    (4096, 2): Launch(4096, 4),
    (4096, 4): Launch(4096, 4),
    (8192, 2): Launch(8192, 8),
    (8192, 4): Launch(8192, 8),
    (16384, 2): Launch(16384, 16),
    (16384, 4): Launch(16384, 16),
}


def launch_for(hidden_size: int, itemsize: int) -> Launch:
    """The launch of a row of `hidden_size` elements. Raises ValueError above MAX_HIDDEN_SIZE."""
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden size {hidden_size} is not in 1..{MAX_HIDDEN_SIZE}, which is what the kernels cover")
    return LAUNCH_TABLE[max(512, 1 << (hidden_size - 1).bit_length()), itemsize]
