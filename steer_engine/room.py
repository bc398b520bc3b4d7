"""Whether an engine has room for the program of a request."""

from __future__ import annotations

from steer_engine.errors import SteeringRequestError
from steer_engine.settings import Limits
from steer_engine.template import ProgramTemplate


def check_room(
    template: ProgramTemplate, *, rows: int, num_armed_blocks: int, bank_rows: int | None, limits: Limits
) -> None:
    """Raise SteeringRequestError if the request names too many vectors, or needs too many bank rows.

    rows: of a request per block. bank_rows: of a bank that can fill up; None if it has room for every request.
    """
    if len(template.vectors) > limits.max_request_vectors:
        raise SteeringRequestError(
            f"The edits and probes name {len(template.vectors)} different vectors; one request may name at most "
            f"{limits.max_request_vectors}.",
            "steering.edits",
        )
    if template.rows > rows:
        raise SteeringRequestError(
            f"The edits need {template.rows} rows at one block; this server has room for {rows} "
            "(--steering-rows). Each edit takes a row, each gate vector and each condition one more; neighbouring "
            "edits of op 'add' with the same scope share a row. Give edits of op 'add' the same scope, or fewer edits "
            "the same blocks.",
            "steering.edits",
        )
    # The bank is not divided by blocks: probes may use the rows that edits leave.
    if template.probes and template.num_bank_rows > rows * num_armed_blocks:
        raise SteeringRequestError(
            f"The edits and probes need {template.num_bank_rows} rows over all blocks; this server has room for "
            f"{rows * num_armed_blocks} (--steering-rows). Measure at fewer blocks.",
            "steering.probes",
        )
    if bank_rows is not None and template.num_bank_rows > bank_rows:
        raise SteeringRequestError(
            f"The edits need {template.num_bank_rows} rows over all blocks; this server's bank has {bank_rows} "
            "(--steering-bank-rows). Steer at fewer blocks, or with fewer vectors.",
            "steering.edits",
        )
