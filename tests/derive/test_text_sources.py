from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest

from steer_engine.derive import load_pairs, load_texts
from steer_engine.errors import DerivationError

PAIRS = {
    "chosen": ["I slept well.", "The sun is out.", "I won."],
    "rejected": ["I slept badly.", "It rains.", "I lost."],
    "prompt": ["", "Look! ", ""],
    "rating": [1, 2, 3],
}
REVIEWS = {
    "review": ["Great.", "Awful.", "Fine.", "Good."],
    "stars": [1, 0, 2, 1],
}


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    """A folder as a hub has it."""
    datasets.Dataset.from_dict(PAIRS).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    return str(tmp_path / "hub")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """As `save_to_disk` leaves it, with two splits and named classes."""
    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["bad", "good", "neither"])}
    )
    reviews = datasets.Dataset.from_dict(REVIEWS, features=features)
    datasets.DatasetDict({"train": reviews, "test": reviews.select([0, 1])}).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_pairs_are_those_of_the_same_file(parquet: str, tmp_path: Path) -> None:
    found = load_pairs(f"hf:{parquet}?positive=chosen&negative=rejected")
    lines = [
        {"positive": good, "negative": bad, "prompt": prompt}
        for good, bad, prompt in zip(PAIRS["chosen"], PAIRS["rejected"], PAIRS["prompt"], strict=True)
    ]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert found.digest == load_pairs(tmp_path / "same.jsonl").digest
    assert found.source == f"hf:{parquet}"
    assert [pair.line for pair in found] == [1, 2, 3]
    assert load_texts(f"hf:{parquet}?positive=chosen&negative=rejected").paired


def test_labels_are_renamed_and_other_rows_are_skipped(saved: str) -> None:
    address = f"hf:{saved}?text=review&label=stars&is_positive=good&is_negative=bad"
    assert [(text.text, text.label) for text in load_texts(address)] == [
        ("Great.", "positive"),
        ("Awful.", "negative"),
        ("Good.", "positive"),
    ]
    assert [text.text for text in load_texts(address + "&limit=2")] == ["Great.", "Awful."]
    assert len(load_texts(address + "&split=test")) == 2
    assert [text.label for text in load_texts(f"hf:{saved}?text=review")] == [""] * 4


WRONG: dict[str, tuple[str, str]] = {
    "no such dataset": ("hf:{folder}/gone", "cannot be read"),
    "no name": ("hf:?split=train", "no dataset is named"),
    "an unknown key": ("hf:{parquet}?splits=train", "unknown key 'splits'; known are split, config, limit"),
    "no such split": ("hf:{saved}?text=review&split=dev", "split 'dev', cannot be read"),
    "no such column": ("hf:{parquet}?positive=best&negative=rejected", "no column 'best'; there are chosen, rejected"),
    "no column of texts": ("hf:{parquet}", "Name them: text=COLUMN, or positive=COLUMN&negative=COLUMN"),
    "labels of another kind": ("hf:{saved}?text=review&label=stars", "the label 'good' is none of positive, negative"),
    "a column of numbers": ("hf:{parquet}?text=rating", "'text' is not text"),
    "one label for both": (
        "hf:{saved}?text=review&label=stars&is_positive=bad&is_negative=bad", "'bad' cannot be both",
    ),
    "labels without a column": ("hf:{parquet}?text=chosen&is_positive=1", "no column of labels"),
    "no limit": ("hf:{parquet}?text=chosen&limit=0", "limit=0 is not a positive number of rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_sentence(name: str, parquet: str, saved: str, tmp_path: Path) -> None:
    address, sentence = WRONG[name]
    with pytest.raises(DerivationError) as raised:
        load_texts(address.format(parquet=parquet, saved=saved, folder=tmp_path))
    assert sentence in raised.value.message


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = None
    monkeypatch.setitem(sys.modules, "datasets", given)
    with pytest.raises(DerivationError, match=r"pip install 'steer-engine\[datasets\]'"):
        load_pairs("hf:anything")
