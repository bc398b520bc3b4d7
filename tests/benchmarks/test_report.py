"""The committed tables match the committed answers, and so do the page on cost and the README."""

from __future__ import annotations

import re
from pathlib import Path

from steer_bench.answer import Answer, Claim, claims_of
from steer_bench.report import TABLE, document, markdown, targets

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "2-cores-epyc-2026-11"
"""The results that README and documentation show."""


def claim(what: str, target: str = "", note: str = "") -> Claim:
    return Claim(what=what, mode="eager", value=1.25, low=1.2, high=1.3, target=target, verdict="met", note=note)


def test_targets_come_first_and_peers_outside_their_versions_are_marked() -> None:
    claims = [claim("a / b"), claim("c / d", target="≥ 1.1", note="asks for vllm 0.30.0")]
    line = "| c / d | 1.250 | 1.200 to 1.300 | ≥ 1.1 | met | eager; the peer asks for vllm 0.30.0 |"
    assert targets(claims).splitlines()[2:] == [line]
    assert document(claims).count(line) == 2
    assert len(markdown(claims).splitlines()) == 4


def test_committed_tables_match_their_answers() -> None:
    assert (COMMITTED / TABLE).read_text() == document(claims_of(COMMITTED))
    for path in COMMITTED.glob("*.json"):
        about = Answer.load(path)[1]
        assert about["machine"]["packages"]
        assert not about["machine"]["changed_files"]
        assert not about["quick"]


def test_the_page_on_cost_has_the_table() -> None:
    assert claims_of(COMMITTED)
    assert targets(claims_of(COMMITTED)) in (ROOT / "docs" / "cost_model.md").read_text()


def test_the_numbers_of_the_readme_are_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+ to [\d.]+) \|$", readme, re.MULTILINE)
    assert [at_once for at_once, _, _ in rows] == ["1", "32", "128"]
    table = markdown(claims_of(COMMITTED)).splitlines()
    for at_once, value, bounds in rows:
        (line,) = [
            line for line in table
            if line.startswith("| distinct vectors / stock |") and f"| compiled, V1 (torch), {at_once} at once," in line
        ]  # fmt: skip
        assert line.startswith(f"| distinct vectors / stock | {value} | {bounds} |")
