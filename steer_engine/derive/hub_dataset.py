"""Hugging Face datasets as the JSON lines that texts and pairs are read from: `hf:NAME_OR_PATH?key=value&...`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from steer_engine.errors import DerivationError

PREFIX = "hf:"
HELP = (
    "hf:NAME_OR_PATH?split=train&config=...&limit=500, then the column of each of text, label, pair, or positive, "
    "negative, prompt, id where it has another name (positive=chosen), and is_positive=VALUE&is_negative=VALUE where "
    "the labels are called otherwise"
)
_COLUMNS = ("positive", "negative", "prompt", "id", "text", "label", "pair")
_LABELS = {"is_positive": "positive", "is_negative": "negative"}
_OTHER = ("split", "config", "limit")


def is_dataset(name_or_path: str | os.PathLike[str]) -> bool:
    return str(name_or_path).startswith(PREFIX)


def read_dataset(address: str) -> bytes:
    """JSON lines, row by row, of the columns that texts or pairs have; other columns are left out.

    Rows whose label is neither `is_positive` nor `is_negative` are left out, where one of these is given; errors count
    the rows that are left.

    Raises:
        DerivationError: the address is wrong, the library is not installed, there is no such dataset, split or column.
    """
    name, options = _parse(address)
    dataset = _load(name, options)
    columns = _columns(address, options, list(dataset.column_names or []))
    labels = _labels(address, options, columns)
    classes = getattr((dataset.features or {}).get(columns.get("label", "")), "names", None)
    rows = _rows(dataset, columns, labels, classes)
    return b"".join(json.dumps(row).encode() + b"\n" for row in islice(rows, _limit(address, options)))


def _parse(address: str) -> tuple[str, dict[str, str]]:
    name, _, query = address.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = (*_OTHER, *_COLUMNS, *_LABELS)
    if unknown := sorted(options.keys() - set(known)):
        raise DerivationError(f"{address}: unknown key {unknown[0][:64]!r}; known are {', '.join(known)}.")
    if not name:
        raise DerivationError(f"{address}: no dataset is named; give {HELP}.")
    return name, options


def _load(name: str, options: dict[str, str]) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise DerivationError("Datasets need the extra 'datasets': pip install 'steer-engine[datasets]'.") from None
    split = options.get("split", "train")
    try:
        if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "dataset_info.json").exists():
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, options.get("config"), split=split)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DerivationError(f"The dataset {name!r}, split {split!r}, cannot be read: {first[:300]}") from None


def _columns(address: str, options: dict[str, str], there: list[str]) -> dict[str, str]:
    """Key of a line -> column of the dataset: as asked, else of the same name where there is one."""
    asked = {key: options[key] for key in _COLUMNS if key in options}
    if missing := [column for column in asked.values() if column not in there]:
        raise DerivationError(f"{address}: there is no column {missing[0][:64]!r}; there are {', '.join(there)}.")
    columns = {key: key for key in _COLUMNS if key in there} | asked
    wanted = ("text", "label", "pair") if "text" in columns else ("positive", "negative")
    columns = {key: column for key, column in columns.items() if key in (*wanted, "prompt", "id")}
    if "text" not in columns and not {"positive", "negative"} <= columns.keys():
        raise DerivationError(
            f"{address}: neither a column of texts nor one of positives and one of negatives; there are "
            f"{', '.join(there)}. Name them: text=COLUMN, or positive=COLUMN&negative=COLUMN."
        )
    return columns


def _labels(address: str, options: dict[str, str], columns: dict[str, str]) -> dict[str, str]:
    """What a label is called in the dataset -> what it is."""
    labels = {options[key]: label for key, label in _LABELS.items() if key in options}
    if labels and "label" not in columns:
        raise DerivationError(f"{address}: no column of labels; name it: label=COLUMN.")
    if len(labels) < len(_LABELS.keys() & options.keys()):
        raise DerivationError(f"{address}: {next(iter(labels))[:64]!r} cannot be both is_positive and is_negative.")
    return labels


def _rows(
    dataset: Any, columns: dict[str, str], labels: dict[str, str], classes: list[str] | None
) -> Iterator[dict[str, Any]]:
    for row in dataset:
        line = {key: row[column] for key, column in columns.items() if row[column] is not None}
        if classes is not None and isinstance(line.get("label"), int):
            line["label"] = classes[line["label"]]
        line |= {key: str(line[key]) for key in ("id", "label", "pair") if key in line}
        if labels:
            if line.get("label") not in labels:
                continue
            line["label"] = labels[line["label"]]
        yield line


def _limit(address: str, options: dict[str, str]) -> int | None:
    if "limit" not in options:
        return None
    if not options["limit"].isdecimal() or not int(options["limit"]):
        raise DerivationError(f"{address}: limit={options['limit'][:16]} is no number of rows.")
    return int(options["limit"])
