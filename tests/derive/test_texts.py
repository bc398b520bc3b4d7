from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer_engine.derive.texts import from_pairs, load_pairs, load_texts
from steer_engine.errors import DerivationError


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


def test_sides_of_a_pair_may_lie_apart(tmp_path: Path) -> None:
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


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
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


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    lines, sentence = BAD[name]
    with pytest.raises(DerivationError, match=r"texts\.jsonl.*" + sentence):
        load_texts(write(tmp_path, *lines))


def test_an_id_that_is_the_place_of_another_pair_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"positive": "a", "negative": "b", "id": "1"}, {"positive": "c", "negative": "d"})
    with pytest.raises(DerivationError, match="an id equals the index of a pair without an id"):
        from_pairs(load_pairs(path))


def test_duplicates_are_named(tmp_path: Path) -> None:
    pair = {"positive": "a", "negative": "b"}
    texts = load_texts(write(tmp_path, pair, {"positive": "a", "negative": "c"}, pair))
    assert list(texts.duplicates()) == [f"{tmp_path}/texts.jsonl:3: the same as line 1; it counts twice."]
    assert len(list(load_texts(write(tmp_path, {"text": "a"}, {"text": "a"})).duplicates())) == 1
