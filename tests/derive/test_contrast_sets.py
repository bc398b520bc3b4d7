from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.make_pairs import SHUFFLED_CHARS, from_shuffled, from_template, to_jsonl
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
