"""Pairs and texts: strict loading, order and digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from steer_engine.derive.text_sources import PACKAGED
from steer_engine.derive.texts import Pair, Pairs, as_pairs, from_pairs, load_pairs, load_texts
from steer_engine.errors import DerivationError

GOOD_PAIRS = '{"positive": "I am glad.", "negative": "I am sad."}\n{"negative": "No.", "positive": "Yes.", "id": "b"}\n'


def write_content(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_file_is_read_in_order_with_its_lines(tmp_path: Path) -> None:
    pairs = load_pairs(write_content(tmp_path, "\ufeff" + GOOD_PAIRS.replace("\n", "\r\n\n")))
    assert [(pair.positive, pair.negative, pair.id, pair.line) for pair in pairs] == [
        ("I am glad.", "I am sad.", "", 1),
        ("Yes.", "No.", "b", 3),
    ]
    assert pairs.source == str(tmp_path / "pairs.jsonl")


def test_line_breaks_of_other_kinds_inside_a_text_are_text(tmp_path: Path) -> None:
    separator = "a\u2028b\x85c"
    content = json.dumps({"positive": separator, "negative": "x"}, ensure_ascii=False) + "\n" + GOOD_PAIRS
    assert load_pairs(write_content(tmp_path, content))[0].positive == separator


BAD_PAIRS = {
    "": "the file is empty",
    " \n\n": "the file is empty",
    GOOD_PAIRS + "{": r"pairs.jsonl:3: not JSON",
    GOOD_PAIRS + "[1]": r":3: not a JSON object",
    '{"positive": "a"}': r":1: the key 'negative' is missing",
    '\n{"negative": "a"}': r":2: the key 'positive' is missing",
    '{"positive": "a", "negative": "b", "label": "c"}': r":1: unknown key 'label'; known are id, negative, positive",
    '{"positive": "a", "negative": 3}': r":1: 'negative' is not text",
    '{"positive": " ", "negative": "b"}': r":1: 'positive' is empty",
    '{"positive": "a", "negative": "a"}': r":1: positive and negative are the same text",
    GOOD_PAIRS + '{"positive": "c", "negative": "d", "id": "b"}': r":3: the id 'b' is already that of line 2",
    '{"positive": "a", "negative": "b"}': r"1 pair\(s\) are too few; at least 2",
    '{"positive": "\\ud800", "negative": "b"}': r":1: 'positive' contains half a surrogate pair",
    '{"positive": "' + "a" * 1_000_001 + '", "negative": "b"}': r":1: 'positive' is longer than 1000000",
    '{"a":' * 100_000: r":1: not JSON",
}


@pytest.mark.parametrize("content", BAD_PAIRS, ids=lambda content: content[:40])
def test_bad_content_is_named_by_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(DerivationError, match=BAD_PAIRS[content]) as caught:
        load_pairs(write_content(tmp_path, content))
    assert len(caught.value.message) < 500


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DerivationError, match=r":3: not UTF-8"):
        load_pairs(write_content(tmp_path, GOOD_PAIRS.encode() + b'{"positive": "\xff", "negative": "b"}'))


def test_a_missing_file_says_what_can_be_given(tmp_path: Path) -> None:
    with pytest.raises(DerivationError, match=r"gone\.jsonl: cannot be read .*sentiment"):
        load_pairs(tmp_path / "gone.jsonl")
    with pytest.raises(DerivationError, match="cannot be read"):
        load_pairs(tmp_path)


def test_the_digest_goes_by_texts_and_order() -> None:
    a, b = Pair(positive="1", negative="2", id="x", line=7), Pair(positive="3", negative="4")
    same = Pairs((Pair(positive="1", negative="2"), b))
    assert Pairs((a, b), "file").digest == same.digest
    assert same.digest == "sha256:144b6ea3770c80958073fddf1ee9655a99265d45ec8c0fb07c230a4c681cf92b"
    for other in (
        Pairs((b, a)),
        Pairs((a, b, b)),
        Pairs((Pair(positive="1", negative="2", prompt="p"), b)),
        Pairs((Pair(positive="2", negative="1"), b)),
    ):
        assert other.digest != same.digest


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_sets_are_parallel_and_varied(name: str) -> None:
    pairs = load_pairs(name)
    assert len(pairs) >= 80
    assert pairs.source == f"{name} (packaged)"
    texts = [text for pair in pairs for text in (pair.positive, pair.negative)]
    assert len(set(texts)) == len(texts)
    assert len({pair.id.split("-")[0] for pair in pairs}) >= 10  # topics
    # Ends and lengths must not tell the sides apart, or that is what the vector would point at.
    assert {text[-1] for text in texts} == {"."}
    lengths = [(len(pair.positive.split()), len(pair.negative.split())) for pair in pairs]
    total = sum(p for p, _ in lengths), sum(n for _, n in lengths)
    assert abs(total[0] - total[1]) < 0.02 * sum(total)
    assert max(abs(p - n) for p, n in lengths) <= 4


def write(tmp_path: Path, *lines: dict[str, Any]) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_become_texts_side_by_side(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"positive": "a", "negative": "b", "prompt": "p"}, {"positive": "c", "negative": "d", "id": "x"}
    )
    texts = load_texts(path)
    assert [(t.id, t.label, t.pair, t.prompt + t.text, t.line) for t in texts] == [
        ("0/positive", "positive", "0", "pa", 1),
        ("0/negative", "negative", "0", "pb", 1),
        ("x/positive", "positive", "x", "c", 2),
        ("x/negative", "negative", "x", "d", 2),
    ]
    assert texts.digest == load_pairs(path).digest
    assert texts.paired


def test_sides_of_a_pair_need_not_be_adjacent(tmp_path: Path) -> None:
    lines = [
        {"text": "no 1", "label": "negative", "pair": "1"},
        {"text": "yes 2", "label": "positive", "pair": "2"},
        {"text": "yes 1", "label": "positive", "pair": "1"},
        {"text": "no 2", "label": "negative", "pair": "2"},
    ]
    texts = load_texts(write(tmp_path, *lines))
    assert [(text.text, text.line) for text in texts] == [("yes 1", 3), ("no 1", 1), ("yes 2", 2), ("no 2", 4)]
    renamed = load_texts(write(tmp_path, *(line | {"pair": f"n{line['pair']}", "id": line["text"]} for line in lines)))
    assert renamed.digest == texts.digest
    lines[0]["pair"], lines[3]["pair"] = "2", "1"
    turned = load_texts(write(tmp_path, *lines))
    assert turned.digest != texts.digest


def test_texts_need_no_label(tmp_path: Path) -> None:
    texts = load_texts(write(tmp_path, {"text": "a"}, {"text": "b", "label": "negative"}))
    assert [(text.id, text.label) for text in texts] == [("0", ""), ("1", "negative")]
    assert not texts.paired


BAD_TEXTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "empty": ([{"text": "a"}, {"text": " "}], r":2: 'text' is empty"),
    "long": ([{"text": "a"}, {"text": "b" * 1_000_001}], r":2: 'text' is longer than 1000000"),
    "label": ([{"text": "a", "label": "good"}], r":1: the label 'good' is none of positive, negative"),
    "key": ([{"text": "a", "labels": "x"}], r":1: unknown key 'labels'"),
    "missing": ([{"text": "a"}, {"label": "positive"}], r":2: the key 'text' is missing"),
    "not text": ([{"text": 3}], r":1: 'text' is not text"),
    "id twice": ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], r":2: the id 'x' is already that of line 1"),
    "side twice": (
        [{"text": "a", "label": "positive", "pair": "p"}, {"text": "b", "label": "positive", "pair": "p"}],
        r":2: the pair 'p' has its positive already, in line 1",
    ),
    "no side": ([{"text": "a", "label": "positive", "pair": "p"}], r":1: the pair 'p' has no negative"),
    "no label": ([{"text": "a", "pair": "p"}], r":1: a text of a pair needs a label"),
    "unpaired among pairs": (
        [{"text": "a", "label": "positive", "pair": "p"}, {"text": "b"}],
        r":2: the text belongs to no pair, but others do",
    ),
    "one": ([{"text": "a"}], r"1 text is too few"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts_are_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    lines, sentence = BAD_TEXTS[name]
    with pytest.raises(DerivationError, match=r"texts\.jsonl.*" + sentence):
        load_texts(write(tmp_path, *lines))


def test_an_id_that_is_the_index_of_another_pair_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"positive": "a", "negative": "b", "id": "1"}, {"positive": "c", "negative": "d"})
    with pytest.raises(DerivationError, match="an id equals the index of a pair without an id"):
        from_pairs(load_pairs(path))


def test_duplicates_are_named(tmp_path: Path) -> None:
    pair = {"positive": "a", "negative": "b"}
    texts = load_texts(write(tmp_path, pair, {"positive": "a", "negative": "c"}, pair))
    assert list(texts.duplicates()) == [f"{tmp_path}/texts.jsonl:3: the same as line 1; it counts twice."]
    assert len(list(load_texts(write(tmp_path, {"text": "a"}, {"text": "a"})).duplicates())) == 1


def test_pairs_in_memory_equal_those_of_a_file(tmp_path: Path) -> None:
    file = load_pairs(write_content(tmp_path, GOOD_PAIRS))
    rows: list[Any] = [json.loads(line) for line in GOOD_PAIRS.splitlines()]
    texts = [("I am glad.", "I am sad."), ["Yes.", "No."]]
    for given in (rows, iter(rows), texts, tuple(texts), Dataset.from_list(rows), [Pair(positive="I am glad.",
                  negative="I am sad."), {"positive": "Yes.", "negative": "No.", "prompt": None}]):  # fmt: skip
        assert as_pairs(given).digest == file.digest
    assert [pair.line for pair in as_pairs(texts)] == [1, 2]
    assert as_pairs([("glad", "sad", "I am "), ("good", "bad", "It is ")])[1].prompt == "It is "


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("ab", "a str is no pair"),
        (("a", "b", "c", "d"), "a tuple is no pair"),
        (("a", 3), "'negative' is not text"),
        (("a", " "), "'negative' is empty"),
        (("a", "a"), "the same text"),
        ({"positive": "a"}, "the key 'negative' is missing"),
        ({"positive": "a", "negative": "b", "promt": "c"}, "unknown key 'promt'"),
        (None, "a NoneType is no pair"),
    ],
)
def test_a_wrong_item_is_named_by_its_number(item: Any, words: str) -> None:
    with pytest.raises(DerivationError, match=f"^pairs:2: .*{words}"):
        as_pairs([("x", "y"), item])
