from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.make_pairs import Question, from_answers, is_correct, load_questions
from steer_engine.derive.texts import load_pairs
from steer_engine.errors import DerivationError


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("3 + 4 = 7\n#### 7", "7", True),
        ("3 + 4 = 7\n#### 8", "7", False),
        ("#### 1,200 and so 3 apples", "1200", True),
        ("First #### 3, no: #### 4.", "4", True),
        ("The answer is 7. I had 9 before", "7", True),
        ("I had 9 and 12, so -$1,200.50", "-1200.5", True),
        ("It is 7 or 8", "7", False),
        ("no number", "7", False),
        ("so it is 5", "He ate two.\n#### 5", True),
        (" wolf, of course", "wolf", True),
        (" Wolf", "wolf", True),
        (" wolfram", "wolf", False),
        ("a wolf", "wolf", False),
        ("", "wolf", False),
    ],
)
def test_what_counts_as_right(completion: str, answer: str, right: bool) -> None:
    assert is_correct(completion, answer) is right


def test_a_pair_needs_both_of_the_models_own_answers() -> None:
    questions = [Question(prompt=f"q{i}", answer="7", line=i + 1) for i in range(4)]
    given = [["7", "8", "9"], ["7", "7"], ["1", "2"], [" ", "#### 8", "#### 7"]]
    pairs = list(from_answers(questions, given))
    assert [(p.prompt, p.positive, p.negative, p.line) for p in pairs] == [
        ("q0", "7", "8", 1),
        ("q3", "#### 7", "#### 8", 4),
    ]


def test_questions_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "x", "answer": " "}\n')
    with pytest.raises(DerivationError, match=r"q\.jsonl:2: the prompt or the answer is empty"):
        load_questions(str(path))
    path.write_text('{"prompt": "1+1="}\n')
    with pytest.raises(DerivationError, match=r"q\.jsonl:1: the key 'answer' is missing"):
        load_questions(str(path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_model_answers_rightly_and_wrongly(smollm2: str, tmp_path: Path) -> None:
    """Easy sums, which a model of 135M parameters gets right now and then."""
    questions = [
        {"prompt": f"2 + 3 = 5\n4 + 1 = 5\n7 + 2 = 9\n{a} + {b} =", "answer": str(a + b)}
        for a, b in ((1, 2), (3, 3), (5, 2), (6, 7), (4, 4), (8, 5))
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    out = tmp_path / "pairs.jsonl"
    arguments = ["pairs", "answers", str(tmp_path / "q.jsonl"), "--model", smollm2, "--out", str(out)]
    arguments += ["--max-tokens", "3", "--samples", "12", "--dtype", "float32", "--max-model-len", "256"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    pairs = load_pairs(out)
    right = {question["prompt"]: question["answer"] for question in questions}
    assert f"{len(pairs)} pairs of 6 questions" in result.output
    for pair in pairs:
        assert is_correct(pair.positive, right[pair.prompt])
        assert not is_correct(pair.negative, right[pair.prompt])
