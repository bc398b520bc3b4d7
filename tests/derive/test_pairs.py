from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer_engine.derive.text_sources import PACKAGED
from steer_engine.derive.texts import Pair, Pairs, load_pairs
from steer_engine.errors import DerivationError

GOOD = '{"positive": "I am glad.", "negative": "I am sad."}\n{"negative": "No.", "positive": "Yes.", "id": "b"}\n'


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_file_is_read_in_order_with_its_lines(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n\n")))
    assert [(pair.positive, pair.negative, pair.id, pair.line) for pair in pairs] == [
        ("I am glad.", "I am sad.", "", 1),
        ("Yes.", "No.", "b", 3),
    ]
    assert pairs.source == str(tmp_path / "pairs.jsonl")


def test_line_breaks_of_other_kinds_inside_a_text_are_text(tmp_path: Path) -> None:
    separator = "a\u2028b\x85c"
    content = json.dumps({"positive": separator, "negative": "x"}, ensure_ascii=False) + "\n" + GOOD
    assert load_pairs(write(tmp_path, content))[0].positive == separator


BAD = {
    "": "the file is empty",
    " \n\n": "the file is empty",
    GOOD + "{": r"pairs.jsonl:3: not JSON",
    GOOD + "[1]": r":3: not a JSON object",
    '{"positive": "a"}': r":1: the key 'negative' is missing",
    '\n{"negative": "a"}': r":2: the key 'positive' is missing",
    '{"positive": "a", "negative": "b", "label": "c"}': r":1: unknown key 'label'; known are id, negative, positive",
    '{"positive": "a", "negative": 3}': r":1: 'negative' is not text",
    '{"positive": " ", "negative": "b"}': r":1: 'positive' is empty",
    '{"positive": "a", "negative": "a"}': r":1: positive and negative are the same text",
    GOOD + '{"positive": "c", "negative": "d", "id": "b"}': r":3: the id 'b' is already that of line 2",
    '{"positive": "a", "negative": "b"}': r"1 pair\(s\) are too few; at least 2",
    '{"positive": "\\ud800", "negative": "b"}': r":1: 'positive' contains half a surrogate pair",
    '{"positive": "' + "a" * 1_000_001 + '", "negative": "b"}': r":1: 'positive' is longer than 1000000",
    '{"a":' * 100_000: r":1: not JSON",
}


@pytest.mark.parametrize("content", BAD, ids=lambda content: content[:40])
def test_bad_content_is_named_by_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(DerivationError, match=BAD[content]) as caught:
        load_pairs(write(tmp_path, content))
    assert len(caught.value.message) < 500


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DerivationError, match=r":3: not UTF-8"):
        load_pairs(write(tmp_path, GOOD.encode() + b'{"positive": "\xff", "negative": "b"}'))


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
