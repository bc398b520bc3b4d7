"""Files that claim what is not so: refused by what is wrong with them, unread where they are large."""

from __future__ import annotations

import base64
import copy
import json
import struct
from typing import Any

import numpy as np
import pytest
from helpers.attack import VECTORS, ask, refusal, send
from helpers.living import HIDDEN_SIZE, NUM_BLOCKS, along
from helpers.server_process import Server

from steer_engine.vectors import ControlVector, RowSet
from steer_engine.vectors.row_set_format import from_bytes as rows_from_bytes
from steer_engine.vectors.row_set_format import to_bytes as rows_to_bytes
from steer_engine.vectors.safetensors_format import from_bytes, to_bytes

GOOD = to_bytes(along(2))
(HEADER_BYTES,) = struct.unpack("<Q", GOOD[:8])
HEADER: dict[str, Any] = json.loads(GOOD[8 : 8 + HEADER_BYTES])
DATA = GOOD[8 + HEADER_BYTES :]
WIDTH = 4 * HIDDEN_SIZE


def file(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int = 0, end: int = WIDTH, dtype: str = "F32", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [HIDDEN_SIZE] if shape is None else shape, "data_offsets": [start, end]}


def with_entry(name: str = "direction.1", **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in HEADER.items() if key == "__metadata__"} | {name: entry(**changes)}


def floats(value: float, only: int | None = None) -> bytes:
    row = np.full(HIDDEN_SIZE, value, np.float32)
    if only is not None:
        row = np.ones(HIDDEN_SIZE, np.float32)
        row[only] = value
    return row.tobytes()


def gguf(version: int, tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


TWICE = file(json.dumps(with_entry() | {"twin": entry()}).replace("twin", "direction.1").encode())
ATTACKS: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "one byte": (b"\0", 400),
    "header longer than the file": (struct.pack("<Q", len(GOOD)) + GOOD[8:], 400),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + GOOD[8:], 400),
    "header of 2^64-1 bytes": (struct.pack("<Q", 2**64 - 1) + GOOD[8:], 400),
    "header of no bytes": (struct.pack("<Q", 0) + DATA, 400),
    "header shorter than its JSON": (struct.pack("<Q", HEADER_BYTES - 5) + GOOD[8:], 400),
    "a list for a header": (file(b"[]"), 400),
    "a number for a header": (file(b"1"), 400),
    "header not UTF-8": (file(b'{"\xff": 1}'), 400),
    "header with NaN": (file(json.dumps(with_entry()).replace("64", "NaN", 1).encode()), 400),
    "10,000 brackets": (file(b"[" * 10_000), 400),
    "two tensors of one name": (TWICE, 400),
    "a million keys": (file(json.dumps({f"direction.{i}": 0 for i in range(1_000_000)}).encode()), 400),
    "a million metadata": (file({**with_entry(), "__metadata__": {f"k{i}": "" for i in range(300_000)}}), 400),
    "metadata of numbers": (file({**with_entry(), "__metadata__": {"format": 1}}), 400),
    "overlapping tensors": (file(with_entry() | {"direction.2": entry()}), 400),
    "a gap before the data": (file(with_entry(start=4, end=WIDTH + 4), DATA + b"1234"), 400),
    "trailing bytes": (GOOD + b"\0", 400),
    "another file behind it": (GOOD + GOOD, 400),
    "cut short": (GOOD[:-1], 400),
    "only a header": (GOOD[: 8 + HEADER_BYTES], 400),
    "offsets beyond the file": (file(with_entry(end=2**40)), 400),
    "offsets backwards": (file(with_entry(start=WIDTH, end=0)), 400),
    "negative offsets": (file(with_entry(start=-WIDTH, end=0)), 400),
    "offsets of 2^70": (file(with_entry(end=2**70)), 400),
    "a negative size": (file(with_entry(shape=[-HIDDEN_SIZE])), 400),
    "a size of 2^62": (file(with_entry(shape=[2**62])), 400),
    "a size as text": (file(with_entry(shape=["64"])), 400),
    "a size of true": (file(with_entry(shape=[True])), 400),
    "sizes that overflow": (file(with_entry(shape=[2**32, 2**32])), 400),
    "a matrix": (file(with_entry(shape=[8, 8])), 400),
    "a scalar": (file(with_entry(shape=[], end=4), DATA[:4]), 400),
    "no tensor": (file({"__metadata__": HEADER.get("__metadata__", {})}, b""), 400),
    "no element": (file(with_entry(shape=[0], end=0), b""), 400),
    "double precision": (file(with_entry(dtype="F64", end=2 * WIDTH), DATA * 2), 400),
    "integers": (file(with_entry(dtype="I32")), 400),
    "booleans": (file(with_entry(dtype="BOOL", end=HIDDEN_SIZE), bytes(HIDDEN_SIZE)), 400),
    "an unknown dtype": (file(with_entry(dtype="F33")), 400),
    "a foreign tensor": (file(with_entry(name="model.layers.0.weight")), 400),
    "block -1": (file(with_entry(name="direction.-1")), 400),
    "block 01": (file(with_entry(name="direction.01")), 400),
    "block of Arabic digits": (file(with_entry(name="direction.\u0661")), 400),
    "block 10^30": (file(with_entry(name=f"direction.{10**30}")), 400),
    "another format": (file({**with_entry(), "__metadata__": {"format": "pt", "format_version": "9"}}), 400),
    "NaN": (file(HEADER, floats(float("nan"))), 422),
    "one NaN": (file(HEADER, floats(float("nan"), only=63)), 422),
    "infinity": (file(HEADER, floats(float("inf"), only=0)), 422),
    "zero": (file(HEADER, bytes(WIDTH)), 422),
    "negative zero": (file(HEADER, floats(-0.0)), 422),
    "other model's size": (to_bytes(ControlVector(directions={1: np.ones(HIDDEN_SIZE + 1, np.float32)})), 422),
    "a block too many": (to_bytes(ControlVector(directions={NUM_BLOCKS: np.ones(HIDDEN_SIZE, np.float32)})), 422),
    "a pickle": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.", 400),
    "a zip": (b"PK\x03\x04" + bytes(60), 400),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), 400),
    "JSON": (b'{"directions": [1, 2, 3]}', 400),
    "GGUF of nothing": (b"GGUF", 400),
    "GGUF version 0": (gguf(0, 1, 1), 400),
    "GGUF of 2^62 tensors": (gguf(3, 2**62, 1), 400),
    "GGUF of 2^62 pairs": (gguf(3, 1, 2**62), 400),
    "GGUF with a string of 2^62": (gguf(3, 1, 1, struct.pack("<Q", 2**62) + b"general"), 400),
    "GGUF with an array of arrays": (gguf(3, 0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 2**40)), 400),
    "GGUF in big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), 400),
}  # fmt: skip


# Row sets: format version 2

RNG = np.random.default_rng(0)
ROWS = RowSet(
    kind="features",
    read={1: RNG.normal(size=(2, HIDDEN_SIZE)).astype(np.float32)},
    write={1: RNG.normal(size=(2, HIDDEN_SIZE)).astype(np.float32)},
    bias={1: np.array([0.5, -0.5], np.float32)},
    threshold={1: np.array([0.25, 0.5], np.float32)},
    indices={1: np.array([3, 40])},
)
GOOD_ROWS = rows_to_bytes(ROWS)
(ROW_HEADER_BYTES,) = struct.unpack("<Q", GOOD_ROWS[:8])
ROW_HEADER: dict[str, Any] = json.loads(GOOD_ROWS[8 : 8 + ROW_HEADER_BYTES])
ROW_DATA = GOOD_ROWS[8 + ROW_HEADER_BYTES :]


def rows(name: str | None = None, data: bytes = ROW_DATA, **fields: Any) -> bytes:
    """The good row set with other fields of one tensor; None: of its metadata."""
    header = copy.deepcopy(ROW_HEADER)
    header["__metadata__" if name is None else name].update(fields)
    return file(header, data)


def renamed(old: str, new: str) -> bytes:
    return file({new if name == old else name: each for name, each in ROW_HEADER.items()}, ROW_DATA)


def overwritten(name: str, raw: bytes) -> bytes:
    """The good row set with other bytes at the start of one tensor."""
    begin = ROW_HEADER[name]["data_offsets"][0]
    return rows(data=ROW_DATA[:begin] + raw + ROW_DATA[begin + len(raw) :])


def of_shape(hidden_size: int, block: int) -> bytes:
    part = {block: np.ones((1, hidden_size), np.float32)}
    return rows_to_bytes(RowSet(kind="features", read=part, write=part))


NUMBERS = {"NaN": float("nan"), "infinity": float("inf")}
ROW_ATTACKS: dict[str, tuple[bytes, int]] = {
    "rows cut short": (GOOD_ROWS[:-1], 400),
    "rows and trailing bytes": (GOOD_ROWS + b"\0", 400),
    "rows, and a vector behind": (GOOD_ROWS + GOOD, 400),
    "rows of no kind": (rows(kind=""), 400),
    "rows of a foreign kind": (rows(kind="rotation"), 400),
    "rows of version 3": (rows(format_version="3"), 400),
    "rows of version 1": (rows(format_version="1"), 400),
    "ranks with thresholds": (rows(kind="low_rank"), 400),
    "labels that are no JSON": (rows(labels="{"), 400),
    "labels with a key twice": (rows(labels='{"1":{"3":"a","3":"b"}}'), 400),
    "labels of 10,000 brackets": (rows(labels="[" * 10_000), 400),
    "labels of many rows": (rows(labels=json.dumps({"1": dict.fromkeys(map(str, range(300_000)), "")})), 400),
    "a label that clears the screen": (rows(labels='{"1":{"3":"\\u001b[2J"}}'), 400),
    "a label with half a character": (rows(labels='{"1":{"3":"\\ud800"}}'), 400),
    "rows with a fitted probe": (rows(probe='{"at":"mean_prompt","blocks":{"1":{}}}'), 400),
    "a direction among rows": (renamed("bias.1", "direction.1"), 400),
    "rows of block 01": (renamed("bias.1", "bias.01"), 400),
    "rows of block 10^30": (renamed("bias.1", f"bias.{10**30}"), 400),
    "no write rows": (renamed("write.1", "write.2"), 400),
    "a bias of 16 bits": (rows("bias.1", dtype="F16"), 400),
    "rows of 64 bits": (rows("read.1", dtype="F64"), 400),
    "numbers that are floats": (rows("index.1", dtype="F32", shape=[4]), 400),
    "rows that are a row": (rows("read.1", shape=[2 * HIDDEN_SIZE]), 400),
    "read and write rows of other shapes": (rows("read.1", shape=[1, 2 * HIDDEN_SIZE]), 400),
    "no rows": (rows("read.1", shape=[0, HIDDEN_SIZE]), 400),
    "2^62 rows": (rows("read.1", shape=[2**62, 4]), 400),
    "rows of 40 GB": (rows("read.1", shape=[4096, 65536], data_offsets=[0, 4096 * 65536 * 4]), 400),
    "a million rows": (rows("read.1", shape=[10**6, HIDDEN_SIZE]), 400),
    "a number of rows that is true": (rows("read.1", shape=[True, 2 * HIDDEN_SIZE]), 400),
    "rows over other rows": (rows("write.1", data_offsets=ROW_HEADER["read.1"]["data_offsets"]), 400),
    "rows backwards": (rows("write.1", data_offsets=ROW_HEADER["write.1"]["data_offsets"][::-1]), 400),
    "rows in descending order": (overwritten("index.1", struct.pack("<2q", 40, 3)), 400),
    "a row twice": (overwritten("index.1", struct.pack("<2q", 3, 3)), 400),
    "row -1": (overwritten("index.1", struct.pack("<2q", -1, 3)), 400),
    "row 2^63-1": (overwritten("index.1", struct.pack("<2q", 3, 2**63 - 1)), 400),
    **{
        f"{word} in {part}": (overwritten(f"{part}.1", struct.pack("<f", number)), 422)
        for part in ("read", "write", "bias", "threshold")
        for word, number in NUMBERS.items()
    },
    "rows of another model": (of_shape(HIDDEN_SIZE + 1, 1), 422),
    "rows of a block too many": (of_shape(HIDDEN_SIZE, NUM_BLOCKS), 422),
}
EVERY = ATTACKS | ROW_ATTACKS


@pytest.mark.parametrize(("data", "status"), EVERY.values(), ids=EVERY)
def test_a_hostile_file_is_refused(living: Server, data: bytes, status: int) -> None:
    refusal(send(living, "PUT", f"{VECTORS}/hostile", data), data, status=status)


def test_a_good_file_is_what_these_are_made_of(living: Server) -> None:
    assert from_bytes(file(HEADER)) == from_bytes(file(with_entry())) == along(2)
    assert send(living, "PUT", f"{VECTORS}/good", file(with_entry())).status_code == 201
    assert send(living, "DELETE", f"{VECTORS}/good").status_code == 200
    assert rows_from_bytes(rows()) == ROWS
    assert send(living, "PUT", f"{VECTORS}/good-rows", rows()).status_code == 201
    answer = ask(living, json.dumps(asking(rows(), FEATURE)).encode())
    assert answer.status_code == 200, answer.text
    assert send(living, "DELETE", f"{VECTORS}/good-rows").status_code == 200


FEATURE = {"op": "feature", "feature": 3, "target": 1.0}


def asking(data: bytes, edit: dict[str, Any]) -> dict[str, Any]:
    """A generating request with a file in it."""
    edit = edit | {"vector": {"data": base64.b64encode(data).decode()}}
    return {"model": "tiny", "prompt": "a", "max_tokens": 1, "steering": {"edits": [edit]}}


def test_a_hostile_file_in_a_request_is_refused_too(living: Server) -> None:
    """The same tables as inline vectors: base64 inside a generating request."""
    for name, (data, _) in EVERY.items():
        if len(data) > 100_000:
            continue  # more than a spec may have: below
        body = asking(data, FEATURE if name in ROW_ATTACKS else {})
        answer = ask(living, json.dumps(body).encode())
        assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text[:500])
        error = refusal(answer, json.dumps(body))
        assert error["param"].startswith("steering"), (name, error)


@pytest.mark.parametrize("data", ["", "=", "%%%", "QQ=", "Q" * 50_001, "\u00e9", "Qk\nFE", 7, None, [], {}])
def test_what_is_no_base64_is_refused(living: Server, data: Any) -> None:
    steering = {"edits": [{"vector": {"data": data}}]}
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1, "steering": steering})
    refusal(ask(living, body.encode()), body, status=400)
