"""Answers as tables, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from steer_bench.answer import Answer, Claim

TABLE = "table.md"
"""File name of the Markdown table, in the folder of the answers."""


def show(answer: Answer, console: Console) -> None:
    """Print the measurements, then the claims."""
    for columns, rows in _tables(answer.rows):
        table = Table(title=answer.question, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*(str(row.get(column, "")) for column in columns))
        console.print(table)
    if answer.claims:
        console.print(_claims(answer.claims))


def _tables(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[dict[str, Any]]]]:
    """Group rows with the same columns into (columns, rows)."""
    tables: list[tuple[list[str], list[dict[str, Any]]]] = []
    for row in rows:
        columns = [column for column in row if column != "ratio"] + (["ratio"] if "ratio" in row else [])
        known = next(
            (table for table in tables if set(columns) <= set(table[0]) or set(table[0]) <= set(columns)), None
        )
        if known is None:
            tables.append((columns, [row]))
        else:
            known[0].extend(column for column in columns if column not in known[0])
            known[1].append(row)
    return tables


def _claims(claims: Sequence[Claim]) -> Table:
    table = Table(title="claims", title_justify="left")
    for column in ("what", "mode", "measured", "95 % interval", "target", "verdict"):
        table.add_column(column)
    for claim in claims:
        table.add_row(claim.what, claim.mode, number(claim), interval(claim), claim.target, claim.verdict)
    return table


def number(claim: Claim) -> str:
    return f"{claim.value:.3g} {claim.unit}" if claim.unit else f"{claim.value:.3f}"


def interval(claim: Claim) -> str:
    form = ".3g" if claim.unit else ".3f"
    return f"{claim.low:{form}} to {claim.high:{form}}"


def document(claims: Sequence[Claim]) -> str:
    """All claims in Markdown. A first table has only those with a target."""
    return f"{targets(claims)}\nAll that was compared:\n\n{markdown(claims)}"


def targets(claims: Sequence[Claim]) -> str:
    """The Markdown table of the claims with a target, as in docs/cost_model.md."""
    return markdown([claim for claim in claims if claim.target])


def markdown(claims: Sequence[Claim]) -> str:
    """A Markdown table with one line per claim."""
    lines = ["| | measured | 95 % interval | target | | measured in |", "|---|---|---|---|---|---|"]
    for claim in claims:
        note = f"; the peer {claim.note}" if claim.note else ""
        measured = f"{number(claim)} | {interval(claim)} | {claim.target} | {claim.verdict}"
        lines.append(f"| {claim.what} | {measured} | {claim.mode}{note} |")
    return "\n".join(lines) + "\n"
