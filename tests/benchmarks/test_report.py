"""The committed tables match the committed answers, and the README has the same table."""

from __future__ import annotations

from pathlib import Path

from steer_bench.answer import Answer, Claim, claims_of
from steer_bench.report import TABLE, document, markdown, targets

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "2-cores-epyc-2026-11"
"""The results that the README shows."""


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


def test_the_readme_has_the_table() -> None:
    assert claims_of(COMMITTED)
    assert targets(claims_of(COMMITTED)) in (ROOT / "README.md").read_text()
