"""Where texts come from: JSONL files, Hugging Face datasets (`hf:NAME?key=value&...`) and packaged sets.

All three are read as JSON lines. An error names the file and, if there is one, the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Set
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from steer_engine.errors import DerivationError

PACKAGED = {"sentiment": "cheerful against gloomy first-person sentences"}
"""Sets of pairs that ship with the package. Their names are accepted wherever a file is."""

PREFIX = "hf:"

_DATASET_HELP = (
    "hf:NAME_OR_PATH?split=train&config=...&limit=500. Name the columns that differ from text, label, pair, positive, "
    "negative, prompt or id (positive=chosen), and the labels that differ from positive and negative "
    "(is_positive=VALUE&is_negative=VALUE)"
)
_COLUMNS = ("positive", "negative", "prompt", "id", "text", "label", "pair")
_LABELS = {"is_positive": "positive", "is_negative": "negative"}
_OTHER_KEYS = ("split", "config", "limit")


def read_set(name_or_path: str | os.PathLike[str]) -> tuple[str, bytes]:
    """Name for messages, and JSON lines, of a file, a dataset or a packaged set."""
    name = str(name_or_path)
    if name.startswith(PREFIX):
        return name.partition("?")[0], read_dataset(name)
    if name in PACKAGED and not Path(name).exists():
        return f"{name} (packaged)", resources.files("steer_engine.derive").joinpath(f"data/{name}.jsonl").read_bytes()
    return name, read_bytes(name, f"Give a JSONL file, hf:DATASET, or one of: {', '.join(PACKAGED)}.")


def read_bytes(path: str | os.PathLike[str], advice: str = "Give a JSONL file.") -> bytes:
    """Content of a file. If it cannot be read, the DerivationError ends with `advice`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DerivationError(f"{path}: cannot be read ({error.strerror}). {advice}") from None


def parse_lines(
    data: bytes, source: str, *, required: tuple[str, ...], optional: Set[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number, from 1, and JSON object of each line that is not empty. All values are text.

    Raises:
        DerivationError: a line is not such an object; names `source` and the line.
    """
    if not data.strip():
        wanted = " and ".join(map(repr, required))
        raise DerivationError(f"{source}: the file is empty; each line is an object with {wanted}.")
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if raw.strip():
            try:
                yield line, _parse_line(raw, line, required, optional)
            except DerivationError as error:
                raise DerivationError(f"{source}:{line}: {error.message}") from None


def _parse_line(raw: bytes, line: int, required: tuple[str, ...], optional: Set[str]) -> dict[str, str]:
    try:
        entry: Any = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise DerivationError("not UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DerivationError(f"not JSON ({error}).") from None
    if not isinstance(entry, dict):
        raise DerivationError(f"not a JSON object with {' and '.join(map(repr, required))}.")
    check_entry(entry, required, optional)
    return entry


def check_entry(entry: Mapping[str, Any], required: tuple[str, ...], optional: Set[str]) -> None:
    """Raise DerivationError unless an entry has the keys, no others, and texts that a tokenizer accepts."""
    for name in required:
        if name not in entry:
            raise DerivationError(f"the key {name!r} is missing.")
    if unknown := entry.keys() - optional - set(required):
        known = ", ".join(sorted(optional | set(required)))
        raise DerivationError(f"unknown key {sorted(unknown)[0][:64]!r}; known are {known}.")
    for name, value in entry.items():
        if not isinstance(value, str):
            raise DerivationError(f"{name!r} is not text.")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DerivationError(f"{name!r} contains half a surrogate pair, which no tokenizer accepts.")


def read_dataset(address: str) -> bytes:
    """JSON lines of a dataset, one per row, with the columns of texts or pairs only.

    With `is_positive` or `is_negative`, rows with any other label are skipped. Line numbers in errors count the rows
    that remain.

    Raises:
        DerivationError: the address is wrong, the library is not installed, or there is no such dataset, split or
            column.
    """
    name, options = _parse_address(address)
    dataset = _load_dataset(name, options)
    columns = _columns(address, options, list(dataset.column_names or []))
    labels = _labels(address, options, columns)
    classes = getattr((dataset.features or {}).get(columns.get("label", "")), "names", None)
    rows = _rows(dataset, columns, labels, classes)
    return b"".join(json.dumps(row).encode() + b"\n" for row in islice(rows, _limit(address, options)))


def _parse_address(address: str) -> tuple[str, dict[str, str]]:
    name, _, query = address.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = (*_OTHER_KEYS, *_COLUMNS, *_LABELS)
    if unknown := sorted(options.keys() - set(known)):
        raise DerivationError(f"{address}: unknown key {unknown[0][:64]!r}; known are {', '.join(known)}.")
    if not name:
        raise DerivationError(f"{address}: no dataset is named; give {_DATASET_HELP}.")
    return name, options


def _load_dataset(name: str, options: dict[str, str]) -> Any:
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


def _columns(address: str, options: dict[str, str], available: list[str]) -> dict[str, str]:
    """Key of a line -> column of the dataset: the one named in the address, else the one with the key's name."""
    named = {key: options[key] for key in _COLUMNS if key in options}
    if missing := [column for column in named.values() if column not in available]:
        raise DerivationError(f"{address}: there is no column {missing[0][:64]!r}; there are {', '.join(available)}.")
    columns = {key: key for key in _COLUMNS if key in available} | named
    wanted = ("text", "label", "pair") if "text" in columns else ("positive", "negative")
    columns = {key: column for key, column in columns.items() if key in (*wanted, "prompt", "id")}
    if "text" not in columns and not {"positive", "negative"} <= columns.keys():
        raise DerivationError(
            f"{address}: there is no column `text`, and no columns `positive` and `negative`; there are "
            f"{', '.join(available)}. Name them: text=COLUMN, or positive=COLUMN&negative=COLUMN."
        )
    return columns


def _labels(address: str, options: dict[str, str], columns: dict[str, str]) -> dict[str, str]:
    """Label in the dataset -> `positive` or `negative`."""
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
        raise DerivationError(f"{address}: limit={options['limit'][:16]} is not a positive number of rows.")
    return int(options["limit"])
