"""A run that is killed at any byte resumes. Numbers of another run are never used."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.journal import Journal

FACTS = {"model": "m", "seed": 0}
SCORE = {"accuracy": 1.0, "kl": 0.12345678901234567}


def filled(path: Path) -> bytes:
    with Journal(path, FACTS) as journal:
        for number in range(3):
            journal.add(("test", "baseline", f"q{number}"), SCORE)
        journal.commit()
    return path.read_bytes()


def test_numbers_are_loaded_exactly(tmp_path: Path) -> None:
    filled(tmp_path / "j.jsonl")
    with Journal(tmp_path / "j.jsonl", FACTS) as journal:
        assert len(journal) == 3
        assert journal["test", "baseline", "q1"] == SCORE
        assert ("test", "baseline", "q3") not in journal


def test_a_file_cut_at_any_byte_keeps_its_complete_lines(tmp_path: Path) -> None:
    whole = filled(tmp_path / "j.jsonl")
    path = tmp_path / "cut.jsonl"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path, FACTS) as journal:
            assert len(journal) == max(0, whole[:size].count(b"\n") - 1)
        # The incomplete line is removed, also if the next one is shorter.
        assert path.read_bytes() == whole[: max(whole.index(b"\n") + 1, whole[:size].rfind(b"\n") + 1)]
        with Journal(path, FACTS) as journal:
            for number in range(len(journal), 3):
                journal.add(("test", "baseline", f"q{number}"), SCORE)
        assert path.read_bytes() == whole


def test_a_journal_of_another_run_is_refused_and_unchanged(tmp_path: Path) -> None:
    whole = filled(tmp_path / "j.jsonl")
    with pytest.raises(EvaluationError, match="numbers of another run"):
        Journal(tmp_path / "j.jsonl", {**FACTS, "seed": 1})
    assert (tmp_path / "j.jsonl").read_bytes() == whole


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    whole = filled(tmp_path / "j.jsonl")
    with Journal(tmp_path / "j.jsonl", FACTS) as journal:
        with pytest.raises(EvaluationError, match=r"j\.jsonl: another run is writing this file"):
            Journal(tmp_path / "j.jsonl", FACTS)
        journal.add(("test", "baseline", "q3"), SCORE)
    with Journal(tmp_path / "j.jsonl", FACTS) as journal:
        assert len(journal) == 4
    assert (tmp_path / "j.jsonl").read_bytes().startswith(whole)


@pytest.mark.parametrize("line", [b"[]", b"5", b"[1, 2, 3, 4]", b"[[], 1, 2, {}]"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, line: bytes) -> None:
    whole = filled(tmp_path / "j.jsonl")
    (tmp_path / "j.jsonl").write_bytes(whole + line + b"\n")
    with pytest.raises(EvaluationError, match=r"j.jsonl:5: not a journal line. Remove this line to keep the others"):
        Journal(tmp_path / "j.jsonl", FACTS)


def test_without_the_named_line_the_others_are_kept(tmp_path: Path) -> None:
    head, first, second, third = filled(tmp_path / "j.jsonl").splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_bytes(head + first + second[:20] + b"\n" + third)
    with pytest.raises(EvaluationError, match=r"j.jsonl:3: "):
        Journal(tmp_path / "j.jsonl", FACTS)
    (tmp_path / "j.jsonl").write_bytes(head + first + third)
    with Journal(tmp_path / "j.jsonl", FACTS) as journal:
        assert [("test", "baseline", f"q{number}") in journal for number in range(3)] == [True, False, True]
