"""Pairs from templates, shuffled prompts and a model's own answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.make_pairs import (
    SHUFFLED_CHARS,
    Question,
    contrast,
    from_answers,
    from_shuffled,
    from_template,
    is_correct,
    load_questions,
    to_jsonl,
)
from steer_engine.derive.texts import Pair, load_pairs
from steer_engine.errors import DerivationError


def lines(*words: str) -> list[tuple[int, str]]:
    return list(enumerate(words, start=1))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["pairs", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_template_gets_every_place_of_the_lists() -> None:
    pairs = from_template(["I am {word}.", "{word}, {word}!"], lines("glad", "calm"), lines("sad", "angry"))
    assert [(pair.positive, pair.negative) for pair in pairs] == [
        ("I am glad.", "I am sad."),
        ("glad, glad!", "sad, sad!"),
        ("I am calm.", "I am angry."),
        ("calm, calm!", "angry, angry!"),
    ]


@pytest.mark.parametrize(
    ("templates", "good", "bad", "sentence"),
    [
        (["no slot"], ("a",), ("b",), r"'no slot' has no \{word\} for"),
        ([], ("a",), ("b",), r"0 template\(s\), 1 positive"),
        (["{word}"], ("a", "b"), ("c",), "2 positive and 1 negative words"),
        (["{word}"], (), (), "0 positive and 0 negative words"),
        (["{word}"], ("x", "a"), ("y", "a"), "Line 2 of both word lists is 'a'"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    templates: list[str], good: tuple[str, ...], bad: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(DerivationError, match=sentence):
        list(from_template(templates, lines(*good), lines(*bad)))


def test_negatives_are_permutations_of_the_beginning() -> None:
    prompts = lines("Then, Anna and Bob went to the garden. " * 3, "ab", "short prompt")
    pairs = list(from_shuffled(prompts, "x"))
    for (line, prompt), pair in zip(prompts, pairs, strict=True):
        assert (pair.positive, pair.line) == (prompt, line)
        assert Counter(pair.negative) == Counter(prompt[:SHUFFLED_CHARS])
        assert pair.negative != prompt[:SHUFFLED_CHARS]
    assert len(pairs[0].negative) == 75
    assert pairs[1].negative == "ba"
    assert list(from_shuffled(prompts, "x")) == pairs
    assert list(from_shuffled(prompts, "x", seed=1)) != pairs
    with pytest.raises(DerivationError, match=r"x:1: 'aaaa' stays the same however it is shuffled"):
        list(from_shuffled(lines("aaaa"), "x"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    pairs = [Pair(positive="ü\u2028", negative="b", prompt="p", id="1"), Pair(positive="c", negative="d")]
    (tmp_path / "p.jsonl").write_bytes(to_jsonl(pairs))
    read = load_pairs(tmp_path / "p.jsonl")
    assert [(p.positive, p.negative, p.prompt, p.id) for p in read] == [("ü\u2028", "b", "p", "1"), ("c", "d", "", "")]


def test_the_commands_write_files_that_derive_reads(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("glad\n\ncalm\n")
    (tmp_path / "bad.txt").write_text("sad\nangry\n")
    out = tmp_path / "pairs.jsonl"
    words = ["--positive", tmp_path / "good.txt", "--negative", tmp_path / "bad.txt", "--out", out]
    assert "2 pairs" in run("template", "--template", "I am {word}.", *words)
    assert [pair.negative for pair in load_pairs(out)] == ["I am sad.", "I am angry."]
    with pytest.raises(DerivationError, match="this file exists already"):
        run("template", "--template", "I am {word}.", *words)
    run("shuffled", tmp_path / "good.txt", "--out", out, "--force")
    assert [pair.positive for pair in load_pairs(out)] == ["glad", "calm"]
    (tmp_path / "prompts.jsonl").write_text('{"text": "how are you"}\n{"text": "what is it"}\n')
    run("shuffled", tmp_path / "prompts.jsonl", "--out", out, "--force")
    assert [pair.positive for pair in load_pairs(out)] == ["how are you", "what is it"]
    (tmp_path / "good.txt").write_text("glad\n")
    with pytest.raises(DerivationError, match=r"1 pair\(s\) resulted; at least 2 are needed. Nothing was written"):
        run("shuffled", tmp_path / "good.txt", "--out", tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


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


def test_the_answers_of_a_pair_are_named_by_their_numbers() -> None:
    question = Question(prompt="q", answer="7")
    assert contrast(question, [" ", "8", "#### 7", "9", "7"]) == (2, 1)
    assert contrast(question, ["7", " "]) is None
    assert contrast(question, ["8"]) is None


def test_options_of_a_vector_need_its_file(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    arguments = ("answers", tmp_path / "q.jsonl", "--model", "smollm2-135m", "--out", tmp_path / "pairs.jsonl")
    for option, value in (("--method", "pca"), ("--blocks", "3"), ("--position", "mean")):
        with pytest.raises(DerivationError, match="name its file with --vector"):
            run(*arguments, option, value)
    for name, value, told in (
        ("v.txt", "all", "must end in"), ("v.gguf", "all", "--blocks"), ("v.gguf", "0", "block 0"),
        ("v.safetensors", "x", "--blocks"),
    ):  # fmt: skip
        with pytest.raises(DerivationError, match=told):
            run(*arguments, "--vector", tmp_path / name, "--blocks", value)
    with pytest.raises(DerivationError, match="neither 'last' nor 'mean'"):
        run(*arguments, "--vector", tmp_path / "v.safetensors", "--position", "-1")
    with pytest.raises(DerivationError, match="median"):
        run(*arguments, "--vector", tmp_path / "v.safetensors", "--method", "median")


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
