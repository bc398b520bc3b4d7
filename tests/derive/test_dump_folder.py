"""The dump folder: order, damage, locks, and the stored dtypes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.dumping import contrast, manifest, rows_of, texts_of, write

from steer_engine.derive.dump_folder import DumpFolder, DumpManifest
from steer_engine.derive.shard import CODES, decode, encode
from steer_engine.errors import DerivationError
from steer_engine.site import Site


def test_shards_come_in_canonical_order_however_they_are_numbered(tmp_path: Path) -> None:
    rows = contrast(10)
    folder = DumpFolder.start(tmp_path / "d", manifest(20, 8))
    whole = write(tmp_path / "w", rows, cuts=(12,))
    for shard in reversed(whole.shards()):  # the later texts get the lower number
        texts = texts_of(20)[shard.head.first :][: shard.head.texts]
        folder.write(shard.head.first, texts, [rows_of(row) for row in rows[shard.head.first :][: shard.head.texts]])
    shards = folder.require_complete()
    assert [shard.path.name for shard in shards] == ["shard-000001.safetensors", "shard-000000.safetensors"]
    assert np.array_equal(np.concatenate([shard.rows_RD(9) for shard in shards]), rows[:, 1])


DIFFERENT: dict[str, tuple[str, Any]] = {
    "another model": ("model", "org/other"),
    "other weights": ("weights", "sha256:" + "5" * 64),
    "other blocks": ("blocks", [4, 8]),
    "another position": ("position", "mean"),
    "another dtype": ("stored", "bfloat16"),
    "other texts": ("dataset", "sha256:" + "6" * 64),
    "another vLLM": ("versions", {"vllm": "2"}),
    "a chat template": ("chat", True),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_folder_of_something_else_is_not_touched(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", contrast(10))
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    field, value = DIFFERENT[name]
    with pytest.raises(DerivationError, match=f"d is the dump of something else: its {field} is .*, now it would be"):
        DumpFolder.start(folder.path, manifest(20, 8, **{field: value}))
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before
    # Where the texts lie is no part of what they are.
    DumpFolder.start(folder.path, manifest(20, 8, source="elsewhere/pairs.jsonl"))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DerivationError, match=r"it contains other files and no manifest\.json"):
        DumpFolder.start(tmp_path, manifest(20, 8))
    with pytest.raises(DerivationError, match=r"not a dump folder \(manifest.json: No such file"):
        DumpFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 2}, "format_version"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"colour": "red"}, "colour"),
        ({"stored": "int8"}, "stored"),
    ],
)
def test_a_strange_manifest_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    fields = json.loads(manifest(20, 8).to_bytes()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DerivationError, match=rf"manifest\.json: not the manifest of a dump \({sentence}"):
        DumpFolder.open(tmp_path)


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    assert DumpManifest.parse(manifest(20, 8).to_bytes(), "x") == manifest(20, 8)


def truncate(folder: DumpFolder) -> None:
    path = folder.path / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def lose_rows(folder: DumpFolder) -> None:
    (folder.path / "shard-000001.safetensors").unlink()


def break_index(folder: DumpFolder) -> None:
    (folder.path / "shard-000001.jsonl").write_bytes(b"{}\n")


def shorten_index(folder: DumpFolder) -> None:
    path = folder.path / "shard-000001.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def lose_shard(folder: DumpFolder) -> None:
    lose_rows(folder)
    (folder.path / "shard-000001.jsonl").unlink()


def repeat_shard(folder: DumpFolder) -> None:
    for suffix in (".jsonl", ".safetensors"):
        data = (folder.path / f"shard-000001{suffix}").read_bytes()
        (folder.path / f"shard-000007{suffix}").write_bytes(data.replace(b"shard-000001.", b"shard-000007."))


DAMAGED = {
    truncate: r"shard-000001\.safetensors: truncated, \d+ bytes of \d+\. Remove it and its \.jsonl",
    lose_rows: r"shard-000001\.safetensors: missing, but its index is there",
    break_index: r"shard-000001\.jsonl: not the index of a shard",
    shorten_index: r"shard-000001\.jsonl: it describes shard-000001\.safetensors with 4 texts",
    lose_shard: r"16 of 20 texts are there; run the same `steer-engine dump` again",
    repeat_shard: r"shard-00000[17]\.safetensors: its texts are in another shard too",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_names_the_file_and_what_to_do(damage: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", contrast(10), cuts=(8, 12))
    assert len(folder.require_complete()) == 3
    damage(folder)
    with pytest.raises(DerivationError, match=DAMAGED[damage]):
        folder.require_complete()


def test_one_changed_byte_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", contrast(10))
    (shard,) = folder.shards()
    shard.require_digest()
    data = bytearray(shard.path.read_bytes())
    data[-100] ^= 1
    shard.path.write_bytes(data)
    (shard,) = folder.shards()
    with pytest.raises(DerivationError, match=r"shard-000000\.safetensors: damaged, its SHA-256"):
        shard.require_digest()


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    """The other run is another process, and its lock ends with it however it ends."""
    folder = write(tmp_path / "d", contrast(10))
    code = (
        "import sys, time; from pathlib import Path; from steer_engine.derive.dump_folder import DumpFolder\n"
        "with DumpFolder.open(Path(sys.argv[1])).writing():\n    print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-P", "-c", code, str(folder.path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DerivationError, match="another run is writing this dump"), folder.writing():
            pass
    finally:
        other.kill()
        other.wait(20)
        other.stdout.close()
    with folder.writing():
        pass


def test_a_dump_of_another_site_says_so(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", contrast(5)).manifest
    assert b'"site"' not in plain.to_bytes()
    assert plain.vector_metadata("diffmean").site is Site.BLOCK
    of_mlp = plain.model_copy(update={"site": Site.MLP})
    assert DumpManifest.parse(of_mlp.to_bytes(), "m") == of_mlp
    assert of_mlp.vector_metadata("diffmean").site is Site.MLP
    with pytest.raises(DerivationError, match="its site is block, now it would be mlp"):
        plain.require_same(of_mlp, "d")


def test_the_rows_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rows = contrast(5)
    folder = write(tmp_path / "d", rows)
    tensors = load_file(folder.path / "shard-000000.safetensors")
    assert np.array_equal(tensors["site.4"], rows[:, 0])
    assert np.array_equal(tensors["site.9"], rows[:, 1])
    assert tensors["norm_sum"].shape == (10, 2)
    assert tensors["norm_count"].tolist() == [1] * 10
    assert os.stat(folder.path / "shard-000000.safetensors").st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", CODES)
def test_rounding_equals_that_of_torch(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=20_000) * 10.0 ** rng.uniform(-6, 4, size=20_000)).astype(np.float32)
    rows[:3] = 0.0, -0.0, 1 + 2**-8  # a tie
    expected = torch.from_numpy(rows).to(getattr(torch, name))
    assert encode(rows, CODES[name]) == expected.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(decode(encode(rows, CODES[name]), CODES[name]), expected.float().numpy())


@pytest.mark.parametrize(("code", "value"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_values_too_large_for_the_dtype_are_refused(code: str, value: float) -> None:
    with pytest.raises(DerivationError, match=f"do not fit {code}; keep float32"):
        encode(np.array([1.0, -value], dtype=np.float32), code)
