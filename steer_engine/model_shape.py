"""The facts about a served model that a spec is checked against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from steer_engine.site import Site
from steer_engine.spec import Op

MAX_RUNS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The facts about a served model that a spec is checked against."""

    hidden_size: int
    num_blocks: int
    armed_blocks: tuple[int, ...]
    ops: tuple[Op, ...]
    rows: int
    """Bank rows that one request may need per block and site."""
    dtype: str
    """Of the residual stream: "float32", "float16" or "bfloat16"."""
    bank_rows: int | None = None
    """Rows of a bank that can fill up; None if the bank has room for every request."""
    sites: tuple[Site, ...] = ()
    """Where edits may apply besides the outputs of the armed blocks."""
    capture_blocks: tuple[int, ...] = ()
    """Where the stream can be captured; empty if capture is off."""
    is_pipeline: bool = False
    """The blocks are spread over the stages of a pipeline."""
    deals_rows_on_device: bool = False
    """The device decides how many drafts of each request a step verifies: the host does not know whose a row is."""

    @property
    def num_points(self) -> int:
        """Armed blocks, at each of their armed sites."""
        return len(self.armed_blocks) * (1 + len(self.sites))

    @cached_property
    def armed(self) -> frozenset[int]:
        return frozenset(self.armed_blocks)


def describe_blocks(blocks: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` as "0-2, 5"; the first MAX_RUNS_SHOWN runs of them."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    shown_runs = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:MAX_RUNS_SHOWN]]
    return ", ".join(shown_runs) + (f" and {len(runs) - MAX_RUNS_SHOWN} more" if len(runs) > MAX_RUNS_SHOWN else "")
