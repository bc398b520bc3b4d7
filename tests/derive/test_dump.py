"""Dumps of a tiny engine: rows equal those of Hugging Face, and vectors do not depend on shards, restarts or actors."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.derivation import REFERENCES, SMALL, config, cosine, huggingface_rows, varied

from steer_engine.derive import Pair, Pairs, Text, Texts, dump, fit_dump
from steer_engine.derive.actors import PAIRS_PER_CHUNK, CapturePool, capture_pool
from steer_engine.derive.capture_config import Position
from steer_engine.derive.capture_engine import CapturedText
from steer_engine.derive.dump_fitter import DumpFitter
from steer_engine.derive.dump_folder import DumpFolder, DumpManifest
from steer_engine.derive.dump_writer import chunks, fill
from steer_engine.derive.fit import CapturedRows, fit_block
from steer_engine.derive.methods import METHODS
from steer_engine.derive.progress import Progress
from steer_engine.derive.texts import from_pairs
from steer_engine.errors import DerivationError

NUM_PAIRS = 6 * PAIRS_PER_CHUNK + 5
"""Seven chunks, the last one short."""

SILENT = Progress(enabled=False)


def manifest(engines: CapturePool, model: str, texts: Texts, **settings: Any) -> Any:
    return DumpManifest.of("tiny", config(model, blocks=(0, 2), **settings), engines.facts(), texts)


@pytest.fixture(scope="module")
def texts() -> Texts:
    return from_pairs(varied(NUM_PAIRS))


@pytest.fixture(scope="module")
def one_shard(
    tiny_pool: CapturePool, tiny_llama: str, texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> DumpFolder:
    folder = DumpFolder.start(tmp_path_factory.mktemp("dumps") / "one", manifest(tiny_pool, tiny_llama, texts))
    fill(folder, tiny_pool, texts, SILENT)
    assert len(folder.require_complete()) == 1
    return folder


@pytest.fixture(scope="module")
def seven_shards(tiny_pool: CapturePool, one_shard: DumpFolder, texts: Texts) -> DumpFolder:
    folder = DumpFolder.start(one_shard.path.with_name("seven"), one_shard.manifest)
    fill(folder, tiny_pool, texts, SILENT, shard_bytes=1)
    assert len(folder.require_complete()) == 7
    return folder


def bits(folder: DumpFolder, method: str) -> bytes:
    fitter = DumpFitter(str(folder.path))
    return b"".join(fitter.fit(block, method).direction_D.tobytes() for block in folder.manifest.blocks)


@pytest.mark.parametrize("method", METHODS)
def test_directions_do_not_depend_on_how_shards_were_cut(
    method: str, one_shard: DumpFolder, seven_shards: DumpFolder
) -> None:
    assert bits(one_shard, method) == bits(seven_shards, method)


class Interrupted(CapturePool):
    """The engines of another pool, which fail after `calls` chunks."""

    def __init__(self, engines: CapturePool, calls: int) -> None:
        self._engines, self._calls = engines, calls

    def text_errors(self, texts: Sequence[Text], position: Position) -> list[str]:
        return self._engines.text_errors(texts, position)

    def capture_texts(self, chunks: Sequence[Sequence[Text]], position: Position) -> Iterator[list[CapturedText]]:
        for number, rows in enumerate(self._engines.capture_texts(chunks, position)):
            if number == self._calls:
                raise KeyboardInterrupt
            yield rows


def test_an_interrupted_run_is_resumed_and_captures_no_text_twice(
    tiny_pool: CapturePool, one_shard: DumpFolder, texts: Texts
) -> None:
    folder = DumpFolder.start(one_shard.path.with_name("resumed"), one_shard.manifest)
    for done in (0, 2, 4):
        assert sum(shard.head.texts for shard in folder.shards()) == done * 2 * PAIRS_PER_CHUNK
        with pytest.raises(KeyboardInterrupt):
            fill(folder, Interrupted(tiny_pool, 2), texts, SILENT, shard_bytes=1)
        # What a killed process leaves behind: half a shard, and one whose index was not written yet.
        (folder.path / ".shard-000009.safetensors.abc.part").write_bytes(b"half")
        (folder.path / f"shard-{done + 2:06}.safetensors").write_bytes(b"no index")
    fill(folder, tiny_pool, texts, SILENT)
    assert [shard.head.texts for shard in folder.require_complete()] == [64] * 6 + [10]
    assert [entry.id for shard in folder.shards() for entry in shard.entries] == [text.id for text in texts]
    assert not list(folder.path.glob(".shard-*"))
    for method in ("diffmean", "pca"):
        assert bits(folder, method) == bits(one_shard, method)
    # A complete dump is not changed, and no engine is called.
    fill(folder, Interrupted(tiny_pool, 0), texts, SILENT)


@pytest.fixture(scope="module")
def captured(tiny_pool: CapturePool) -> CapturedRows:
    rows = CapturedRows()
    for chunk in tiny_pool.capture_pairs(varied(NUM_PAIRS), keep_rows_of=NUM_PAIRS):
        rows.add(chunk)
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_a_dump_gives_the_bits_of_the_stream(method: str, captured: CapturedRows, one_shard: DumpFolder) -> None:
    for index, block in enumerate((0, 2)):
        dumped = DumpFitter(str(one_shard.path)).fit(block, method)
        streamed = fit_block(captured.at(index, block), method)
        assert dumped.direction_D.tobytes() == streamed.direction_D.tobytes()
        assert dumped.residual_norm == streamed.residual_norm
        assert dumped.separation == streamed.separation
        assert dumped.explained == streamed.explained


@pytest.fixture(scope="module")
def reference(tiny_llama: str) -> list[np.ndarray]:
    """Rows of all tokens at blocks 0 and 2, `[L, T, D]` per text in canonical order, by Hugging Face."""
    sides = [text for pair in varied(NUM_PAIRS) for text in (pair.positive, pair.negative)]
    return [rows[[0, 2]] for rows in huggingface_rows(tiny_llama, sides)]


@pytest.mark.parametrize("method", REFERENCES)
def test_directions_agree_with_hugging_face_in_float64(
    method: str, seven_shards: DumpFolder, reference: list[np.ndarray]
) -> None:
    compared = 0
    for place, block in enumerate(seven_shards.manifest.blocks):
        rows = np.stack([text[place, -1] for text in reference])
        expected = REFERENCES[method](rows[::2], rows[1::2])
        if not expected.any():
            continue
        compared += 1
        fitted = DumpFitter(str(seven_shards.path)).fit(block, method)
        agreement = cosine(fitted.direction_D, expected)
        assert (abs(agreement) if "pca" in method else agreement) >= 0.9999
        gap = (rows[::2] - rows[1::2]).mean(axis=0)
        if method != "mean":
            assert fitted.direction_D @ gap > 0
            assert np.linalg.norm(fitted.direction_D) == pytest.approx(np.linalg.norm(gap), rel=1e-3)
        assert fitted.residual_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-4)
        unit = expected / np.linalg.norm(expected)
        differences = rows[::2] - rows[1::2]
        share = float(((differences @ unit) ** 2).sum() / (differences**2).sum())
        assert fitted.explained == pytest.approx(share, rel=1e-3)
    assert compared


def test_two_actors_fit_the_bits_of_one(one_shard: DumpFolder, seven_shards: DumpFolder) -> None:
    vectors = [
        fit_dump(folder.path, method="pca", actors=actors, progress=False)
        for folder, actors in ((one_shard, 1), (seven_shards, 2))
    ]
    assert vectors[0].digest == vectors[1].digest
    about = vectors[0].metadata
    assert (about.model, about.method, about.num_blocks, about.hidden_size) == ("tiny", "pca", 3, 64)
    assert about.notes == f"{NUM_PAIRS} pairs, captured in float32."
    assert about.dataset_digest == varied(NUM_PAIRS).digest
    assert set(about.separation) == {0, 2}


@pytest.fixture(scope="module")
def another_dump(tiny_llama: str, one_shard: DumpFolder, texts: Texts) -> DumpFolder:
    """Captured by other engines, in other batches."""
    settings = (*SMALL, ("max_num_seqs", 5), ("max_num_batched_tokens", 512))
    with capture_pool(config(tiny_llama, blocks=(0, 2), engine_args=settings), actors=2) as engines:
        folder = DumpFolder.start(one_shard.path.with_name("another"), one_shard.manifest)
        fill(folder, engines, texts, SILENT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", REFERENCES)
def test_separate_dumps_agree(
    method: str, one_shard: DumpFolder, another_dump: DumpFolder, reference: list[np.ndarray]
) -> None:
    compared = 0
    for place, block in enumerate(one_shard.manifest.blocks):
        rows = np.stack([text[place, -1] for text in reference])
        if not REFERENCES[method](rows[::2], rows[1::2]).any():
            continue  # two eigenvalues that are too close
        compared += 1
        one, another = (DumpFitter(str(dump.path)).fit(block, method) for dump in (one_shard, another_dump))
        assert cosine(one.direction_D, another.direction_D) >= 0.99999
    assert compared


POSITIONS = {
    "all": lambda rows: rows,
    "mean": lambda rows: rows.mean(axis=1, keepdims=True),
    "-1,0": lambda rows: rows[:, [-1, 0]],
}


@pytest.mark.parametrize("rule", POSITIONS)
def test_rows_of_every_position_rule_are_those_of_hugging_face(
    rule: str, tiny_pool: CapturePool, tiny_llama: str, reference: list[np.ndarray], tmp_path: Path
) -> None:
    """Ragged, never padded: each text has as many rows as the rule says."""
    texts = from_pairs(varied(4))
    folder = DumpFolder.start(tmp_path / "d", manifest(tiny_pool, tiny_llama, texts, position=Position(rule)))
    fill(folder, tiny_pool, texts, SILENT)
    (shard,) = folder.require_complete()
    norm_NL, count_N = shard.norms()
    for place, block in enumerate((0, 2)):
        kept = shard.rows_RD(block)
        assert len(kept) == shard.entries[-1].rows[1]
        for number, entry in enumerate(shard.entries):
            expected = reference[number][place : place + 1]
            wanted = POSITIONS[rule](expected)[0]
            assert entry.tokens == expected.shape[1]
            # Both compute in float32: some 100 roundings of 2**-24 each, on rows of this size.
            assert kept[slice(*entry.rows)].shape == wanted.shape
            assert np.abs(kept[slice(*entry.rows)] - wanted).max() <= 1e-5 * np.abs(wanted).max()
            # Norms are of token rows, of all but the first where the rule covers it, whatever rows are kept.
            counted = wanted if rule == "-1,0" else expected[0, 1:]
            assert count_N[number] == len(counted)
            assert norm_NL[number, place] == pytest.approx(np.linalg.norm(counted, axis=1).sum(), rel=1e-5)


def test_texts_that_cannot_be_captured_are_all_named_before_anything_is_captured(
    tiny_pool: CapturePool, tiny_llama: str, tmp_path: Path
) -> None:
    pairs = [
        *varied(40),
        Pair(positive="a" * 600, negative="b", line=41),
        Pair(positive="b", negative="c" * 512, line=42),
    ]
    texts = from_pairs(Pairs(tuple(pairs), "varied.jsonl"))
    folder = DumpFolder.start(tmp_path / "d", manifest(tiny_pool, tiny_llama, texts))
    with pytest.raises(DerivationError) as caught:
        fill(folder, tiny_pool, texts, SILENT)
    first, *named = caught.value.message.splitlines()
    assert first == "2 text(s) cannot be captured:"
    assert [line.split(": ")[0] for line in named] == ["varied.jsonl:41", "varied.jsonl:42"]
    assert not folder.shards()


def test_a_full_disk_leaves_complete_shards_and_the_run_is_resumed(
    tiny_pool: CapturePool, one_shard: DumpFolder, texts: Texts
) -> None:
    folder = DumpFolder.start(one_shard.path.with_name("full"), one_shard.manifest)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, Interrupted(tiny_pool, 2), texts, SILENT, shard_bytes=1)
    # The kernel refuses to make any file of this process longer than that.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [rows for chunk in tiny_pool.capture_texts([texts[128:192]], Position("last")) for rows in chunk]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(DerivationError, match=r"shard-000002\.safetensors: cannot be written \(File too large\)"):
            folder.write(128, texts[128:192], rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(folder.shards()) == 2
    assert not list(folder.path.glob(".shard-*"))
    fill(folder, tiny_pool, texts, SILENT)
    assert bits(folder, "diffmean") == bits(one_shard, "diffmean")


def test_chunks_follow_from_the_data(one_shard: DumpFolder) -> None:
    about = one_shard.manifest
    texts = from_pairs(varied(40))
    assert chunks(texts, about) == [range(64), range(64, 80)]
    unpaired = about.model_copy(update={"paired": False})
    assert chunks(texts[:65], unpaired) == [range(64), range(64, 65)]
    # If every token's row is captured, chunks of long texts are smaller, but contain whole pairs.
    wide = about.model_copy(update={"position": "all", "hidden_size": 1 << 20})
    assert chunks(texts[:6], wide) == [range(2), range(2, 4), range(4, 6)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "store": ({"store": "int8"}, "store 'int8' is none of auto, float32"),
    "shard size": ({"shard_bytes": 0}, "Shards of 0 bytes"),
    "shards too large": ({"shard_bytes": 1 << 30}, "Shards of 1073741824 bytes"),
    "blocks": ({"blocks": "3-1"}, "runs backwards"),
    "position": ({"position": "first"}, "none of 'last'"),
    "texts": ({"texts": "gone.jsonl"}, r"gone\.jsonl: cannot be read"),
    "actors": ({"actors": 0}, "0 actors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_are_refused_before_anything_starts(name: str, tiny_llama: str, tmp_path: Path) -> None:
    settings, sentence = WRONG[name]
    with pytest.raises(DerivationError, match=sentence):
        dump(tiny_llama, **{"texts": "sentiment", "folder": tmp_path / "d", "progress": False, **settings})
    assert not (tmp_path / "d").exists()
