"""Whether an engine has room for the program of a request."""

from __future__ import annotations

from steer_engine.errors import SteeringRequestError
from steer_engine.settings import Limits
from steer_engine.template import ProgramTemplate


def check_room(
    template: ProgramTemplate,
    *,
    rows: int,
    num_points: int,
    bank_rows: int | None,
    is_pipeline: bool,
    limits: Limits,
) -> None:
    """Raise SteeringRequestError if the request names too many vectors, or needs too many entries or bank rows.

    rows: entries of a request per point; the bank has as many rows per request and point. num_points: armed blocks, at
    each of their armed sites. bank_rows: of a bank
    that can fill up; None if it has room for every request. is_pipeline: each stage has a bank for its own blocks.
    """
    if len(template.vectors) > limits.max_request_vectors:
        raise SteeringRequestError(
            f"The edits and probes name {len(template.vectors)} different vectors; one request may name at most "
            f"{limits.max_request_vectors}.",
            "steering.edits",
        )
    # The bank of a stage may be for one block alone, where probes need rows as well.
    needed = template.rows_with_probes if is_pipeline else template.num_entries
    if needed > rows:
        what = "edits and probes" if is_pipeline and template.probes else "edits"
        raise SteeringRequestError(
            f"The {what} need {needed} rows at one block; this server has room for {rows} "
            "(--steering-rows). Each edit takes a row, each gate vector and each condition one more; an edit of "
            "several features or ranks takes one for each; neighbouring edits of op 'add' with the same scope share a "
            "row. Give edits of op 'add' the same scope, or fewer edits the same blocks.",
            "steering.edits",
        )
    # The bank is not divided by blocks: a block may use the rows that others leave.
    if template.num_bank_rows > rows * num_points:
        named, advice = ("edits and probes", "Measure") if template.probes else ("edits", "Steer")
        raise SteeringRequestError(
            f"The {named} need {template.num_bank_rows} rows over all blocks; this server has room for "
            f"{rows * num_points} (--steering-rows). Each edit takes a row, each gate vector and each condition "
            f"one more, each rank or feature two. {advice} at fewer blocks.",
            "steering.probes" if template.probes else "steering.edits",
        )
    if bank_rows is not None and template.num_bank_rows > bank_rows:
        raise SteeringRequestError(
            f"The edits need {template.num_bank_rows} rows over all blocks; this server's bank has {bank_rows} "
            "(--steering-bank-rows). Steer at fewer blocks, or with fewer vectors.",
            "steering.edits",
        )
