from __future__ import annotations

from pathlib import Path

from rich.console import Console
from steer_bench.answer import Answer, Claim
from steer_bench.ratio import Ratio, Target
from steer_bench.report import markdown, show

RATIO = Ratio(median=0.98, low=0.96, high=0.99, smallest=0.9, largest=1.0, rounds=7)
ANSWER = Answer(
    question="serve",
    claims=[
        Claim.of_ratio("steered / stock", RATIO, Target(at_least=0.97), mode="compiled, 32 at once"),
        Claim(what="host time", mode="eager", unit="µs", value=64.0, low=60.0, high=70.0),
    ],
    rows=[{"case": "stock", "tok/s": 200.0}, {"case": "steered", "tok/s": 196.0, "ratio": str(RATIO)}, {"ms": 3}],
)


def test_an_answer_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "serve.json"
    ANSWER.save(path, {"machine": {"cores": 2}})
    answer, about = Answer.load(path)
    assert answer == ANSWER
    assert about == {"machine": {"cores": 2}}
    assert not list(path.parent.glob("*.tmp"))


def test_the_table_has_measured_interval_target_and_verdict() -> None:
    lines = markdown(ANSWER.claims).splitlines()
    assert lines[2] == "| steered / stock | 0.980 | 0.960 to 0.990 | ≥ 0.97 | not resolved | compiled, 32 at once |"
    assert lines[3] == "| host time | 64 µs | 60 to 70 |  |  | eager |"


def test_rows_with_other_columns_get_a_separate_table() -> None:
    console = Console(width=150, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        show(ANSWER, console)
    text = capture.get()
    assert text.count("serve") == 2
    assert "0.980 [0.960, 0.990]" in text
