"""Features of small autoencoders, written by hand in each tool's documented layout, and compared with its formula."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from steer_engine.errors import UnusableVectorError, VectorFileError
from steer_engine.vectors import RowSet
from steer_engine.vectors.sae_formats import load_gemma_scope, load_saelens, save_saelens

D, F = 6, 40
PICKED = [7, 39, 0]

Weights = dict[str, np.ndarray]


def weights(*names: str, dtype: Any = np.float32) -> Weights:
    rng = np.random.default_rng(11)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    made = {name: rng.normal(size=shapes.get(name, (F,))).astype(dtype) for name in ("W_enc", "W_dec", "b_dec", *names)}
    if "threshold" in made:
        made["threshold"] = np.abs(made["threshold"])
    return made


def config(**changes: Any) -> dict[str, Any]:
    """As SAELens 6 writes it; None removes a key."""
    metadata = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post", "neuronpedia_id": "gpt2-small/3"}
    metadata |= changes.pop("metadata", {})
    whole = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


def saelens(folder: Path, tensors: Weights, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config(**changes)))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "sae_weights.safetensors"
    )
    return folder


def activations(rows: RowSet, x_ND: np.ndarray) -> np.ndarray:
    """The activations of a row set's features by its own formula, `[N, features]`, in float64."""
    (block,) = rows.blocks
    pre = x_ND.astype(np.float64) @ rows.read[block].astype(np.float64).T + rows.bias[block]
    acts = np.maximum(pre, 0)
    return acts * (pre > rows.threshold[block]) if block in rows.threshold else acts


X_ND = np.random.default_rng(5).normal(size=(200, D))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal within the rounding of float32 rows: D products and a bias, each off by at most 2**-23 of their size."""
    bound = 2.0**-23 * (D + 4) * 60
    assert np.abs(found - expected).max() <= bound
    assert (expected > 0).mean() > 0.05, "the features must be active somewhere"
    assert (expected == 0).mean() > 0.05


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_saelens(tmp_path: Path, architecture: str, subtracted: bool) -> None:
    names = {"standard": ["b_enc"], "jumprelu": ["b_enc", "threshold"], "gated": ["b_gate", "b_mag", "r_mag"]}
    w = weights(*names[architecture])
    folder = saelens(tmp_path / "sae", w, architecture=architecture, apply_b_dec_to_input=subtracted)
    rows = load_saelens(folder, PICKED)
    assert rows.blocks == (3,)
    assert rows.numbers(3) == tuple(sorted(PICKED))
    assert rows.metadata.model == "gpt2-small"
    assert rows.metadata.extra == {"neuronpedia_id": "gpt2-small/3"}
    np.testing.assert_array_equal(rows.write[3], w["W_dec"][sorted(PICKED)])
    # SAELens: encode of the three classes.
    wide = {name: array.astype(np.float64) for name, array in w.items()}
    x = X_ND - wide["b_dec"] * subtracted
    if architecture == "gated":
        gate = x @ wide["W_enc"] + wide["b_gate"] > 0
        expected = gate * np.maximum(x @ (wide["W_enc"] * np.exp(wide["r_mag"])) + wide["b_mag"], 0)
    else:
        pre = x @ wide["W_enc"] + wide["b_enc"]
        expected = np.maximum(pre, 0) * (pre > wide.get("threshold", 0))
    close(activations(rows, X_ND), expected[:, sorted(PICKED)])


def test_a_configuration_of_saelens_before_version_6(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "sae", weights("b_enc"))
    (folder / "cfg.json").write_text(
        json.dumps(
            {
                "hook_point": "blocks.5.hook_resid_pre",
                "hook_point_layer": 5,
                "activation_fn_str": "relu",
                "normalize_activations": False,
                "model_name": "pythia-70m",
            }
        )
    )
    rows = load_saelens(folder, [1])
    assert (rows.blocks, rows.metadata.model) == ((4,), "pythia-70m")


def test_a_factor_of_the_decoder_is_part_of_the_write_rows(tmp_path: Path) -> None:
    w = weights("b_enc", "scaling_factor")
    rows = load_saelens(saelens(tmp_path / "sae", w, finetuning_scaling_factor=True), PICKED)
    np.testing.assert_array_equal(rows.write[3], (w["W_dec"] * w["scaling_factor"][:, None])[sorted(PICKED)])
    with pytest.raises(VectorFileError, match="which the configuration does not mention"):
        load_saelens(saelens(tmp_path / "sae", w), PICKED)
    w["scaling_factor"] = np.ones(F, np.float32)
    rows = load_saelens(saelens(tmp_path / "sae", w), PICKED)
    np.testing.assert_array_equal(rows.write[3], w["W_dec"][sorted(PICKED)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "'topk' cannot be imported: a top-k feature is active only among the k largest"),
        ({"activation_fn": "topk"}, "'topk' cannot be imported"),
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu' cannot be imported"),
        ({"activation_fn": {"name": "topk"}}, "an object cannot be imported"),
        ({"activation_fn": "jumprelu"}, "'jumprelu' cannot be imported"),
        ({"architecture": "batchtopk"}, "save the inference model"),
        ({"architecture": "transcoder"}, "readable are standard, jumprelu, gated with ReLU"),
        ({"architecture": ["standard"]}, "an array cannot be imported"),
        ({"d_out": D + 1}, "a transcoder reads and writes at different places"),
        ({"normalize_activations": "layer_norm"}, "each row is divided by its own norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "each row is divided by its own norm"),
        ({"normalize_activations": "expected_average_only_in"}, r"call fold_activation_norm_scaling_factor\(factor\)"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        (
            {"metadata": {"hook_name": "blocks.3.hook_mlp_out"}},
            "reads 'blocks.3.hook_mlp_out'; only the residual stream",
        ),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "the embeddings"),
        ({"metadata": {"hook_name": "blocks.9999.hook_resid_pre"}}, "block 9998 is not usable"),
        ({"metadata": {"hook_name": None}}, "say it with --block N"),
        ({"metadata": {"hook_name": ["blocks.3.hook_resid_pre"]}}, "it reads an array; only the residual stream"),
        ({"architecture": "jumprelu"}, "no tensor threshold of floats"),
    ],
)
def test_what_rows_cannot_express_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = saelens(tmp_path / "sae", weights("b_enc"), **changes)
    with pytest.raises(VectorFileError, match=message) as caught:
        load_saelens(folder, PICKED)
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_block_can_be_named_where_the_configuration_does_not(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "sae", weights("b_enc"), metadata={"hook_name": None})
    assert load_saelens(folder, PICKED, block=8).blocks == (8,)
    folder = saelens(tmp_path / "sae", weights("b_enc"))
    assert load_saelens(folder, PICKED, block=3).blocks == (3,)
    with pytest.raises(VectorFileError, match="is the output of block 3, not of 8; leave out --block"):
        load_saelens(folder, PICKED, block=8)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "--features 12,345"),
        ([1, 1], "named twice"),
        ([F], f"no feature {F}; it has 0 to {F - 1}"),
        ([-1], "numbered from 0"),
        ([2**31], "numbered from 0"),
        (list(range(4097)), "4097 features are too many"),
    ],
)
def test_features_that_cannot_be_picked(tmp_path: Path, features: list[int], message: str) -> None:
    with pytest.raises(VectorFileError, match=message):
        load_saelens(saelens(tmp_path / "sae", weights("b_enc")), features)


@pytest.mark.parametrize(
    "change", [lambda w: w.update(W_dec=w["W_dec"][:-1]), lambda w: w.update(b_enc=w["b_enc"][:-1])]
)
def test_tensors_that_do_not_fit_each_other(tmp_path: Path, change: Callable[[Weights], None]) -> None:
    w = weights("b_enc")
    change(w)
    with pytest.raises(VectorFileError, match="W_enc needs"):
        load_saelens(saelens(tmp_path / "sae", w), PICKED)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    w = weights("b_enc")
    w["W_enc"][2, PICKED[0]] = np.nan
    folder = saelens(tmp_path / "sae", w)
    with pytest.raises(UnusableVectorError, match="The read of block 3"):
        load_saelens(folder, PICKED)
    assert load_saelens(folder, [5]).count(3) == 1


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_numbers_whose_conversion_warns(tmp_path: Path, name: str) -> None:
    """Signalling NaN: each conversion to float64 is an invalid operation, and warnings are errors here."""
    w = weights("b_enc")
    w[name].view(np.uint32)[...] = 0x7F80_0001
    with pytest.raises(UnusableVectorError, match="of block 3"):
        load_saelens(saelens(tmp_path / "sae", w), PICKED)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=r"cfg\.json: cannot be read"):
        load_saelens(tmp_path, PICKED)
    folder = saelens(tmp_path / "sae", weights("b_enc"))
    (folder / "cfg.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(VectorFileError, match="same key twice"):
        load_saelens(folder, PICKED)
    (folder / "cfg.json").write_bytes(b"\xff")
    with pytest.raises(VectorFileError, match="not UTF-8"):
        load_saelens(folder, PICKED)
    saelens(tmp_path / "sae", weights("b_enc"))
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(VectorFileError, match=r"sae_weights\.safetensors: cannot be read"):
        load_saelens(folder, PICKED)


@pytest.mark.parametrize("jump", [True, False])
def test_a_saelens_folder_that_we_write_is_read_back_exactly(tmp_path: Path, jump: bool) -> None:
    w = weights("b_enc", *(["threshold"] if jump else []))
    rows = load_saelens(saelens(tmp_path / "sae", w, architecture="jumprelu" if jump else "standard"), PICKED)
    save_saelens(rows, tmp_path / "out")
    back = load_saelens(tmp_path / "out", [0, 1, 2])
    for name in ("read", "write", "bias", "threshold"):
        assert getattr(back, name).keys() == getattr(rows, name).keys()
        for block, array in getattr(rows, name).items():
            np.testing.assert_array_equal(getattr(back, name)[block], array)
    assert load_file(tmp_path / "out" / "sae_weights.safetensors")["W_enc"].shape == (D, 3)
    low = RowSet(kind="low_rank", read={1: np.eye(3, dtype="f")}, write={1: np.eye(3, dtype="f")})
    with pytest.raises(VectorFileError, match="holds features of one block"):
        save_saelens(low, tmp_path / "low")


def gemma(folder: Path, save: Callable[..., None] = np.savez, **changes: np.ndarray) -> tuple[Path, Weights]:
    folder.mkdir(parents=True, exist_ok=True)
    w = weights("b_enc", "threshold") | changes
    save(folder / "params.npz", **w)
    return folder / "params.npz", w


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope(tmp_path: Path, save: Callable[..., None]) -> None:
    path, w = gemma(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71", save)
    rows = load_gemma_scope(path, PICKED)
    assert rows == load_gemma_scope(path.parent, PICKED)
    assert rows.blocks == (20,)
    wide = {name: array.astype(np.float64) for name, array in w.items()}
    pre = X_ND @ wide["W_enc"] + wide["b_enc"]  # b_dec is not subtracted
    close(activations(rows, X_ND), (np.maximum(pre, 0) * (pre > wide["threshold"]))[:, sorted(PICKED)])
    np.testing.assert_array_equal(rows.read[20], w["W_enc"].T[sorted(PICKED)])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_other_floats_and_stored_by_columns(
    tmp_path: Path, save: Callable[..., None], order: Any, dtype: Any
) -> None:
    w = {name: np.asarray(array, order=order) for name, array in weights("b_enc", "threshold", dtype=dtype).items()}
    path, _ = gemma(tmp_path / "layer_3", save, **w)
    rows = load_gemma_scope(path, PICKED)
    np.testing.assert_array_equal(rows.read[3], w["W_enc"].T[sorted(PICKED)].astype(np.float32))
    np.testing.assert_array_equal(rows.write[3], w["W_dec"][sorted(PICKED)].astype(np.float32))


def test_many_and_few_columns_are_read_alike(tmp_path: Path) -> None:
    """Few columns of a wide tensor are read one by one, many with their row."""
    rng = np.random.default_rng(2)
    wide = 5000
    w = {"W_enc": rng.normal(size=(3, wide)), "W_dec": rng.normal(size=(wide, 3)), "b_enc": rng.normal(size=wide)}
    arrays = {name: array.astype(np.float32) for name, array in (w | {"threshold": np.ones(wide)}).items()}
    np.savez(tmp_path / "params.npz", **arrays)
    for picked in ([4999, 0, 17], list(range(0, wide, 9))[::-1]):
        rows = load_gemma_scope(tmp_path, picked, block=0)
        np.testing.assert_array_equal(rows.read[0], arrays["W_enc"].T[sorted(picked)])
        np.testing.assert_array_equal(rows.bias[0], arrays["b_enc"][sorted(picked)])


def test_the_block_of_gemma_scope(tmp_path: Path) -> None:
    path, _ = gemma(tmp_path / "plain")
    with pytest.raises(VectorFileError, match="no folder layer_N says the block; say it with --block N"):
        load_gemma_scope(path, PICKED)
    assert load_gemma_scope(path, PICKED, block=7).blocks == (7,)
    path, _ = gemma(tmp_path / "gemma-scope-2b-pt-mlp" / "layer_20" / "width_16k")
    with pytest.raises(VectorFileError, match="the folder says 'mlp'"):
        load_gemma_scope(path, PICKED)


def test_gemma_scope_2(tmp_path: Path) -> None:
    folder = tmp_path / "resid_post" / "layer_12_width_16k_l0_small"
    folder.mkdir(parents=True)
    w = weights("b_enc", "threshold")
    save_file({name.replace("W_", "w_"): array for name, array in w.items()}, folder / "params.safetensors")
    about = {
        "hf_hook_point_in": "model.layers.12.output",
        "model_name": "google/gemma-3-4b-pt",
        "architecture": "jump_relu",
    }
    (folder / "config.json").write_text(json.dumps(about))
    rows = load_gemma_scope(folder, PICKED)
    assert (rows.blocks, rows.metadata.model) == ((12,), "google/gemma-3-4b-pt")
    np.testing.assert_array_equal(rows.read[12], w["W_enc"].T[sorted(PICKED)])
    for change in (
        {"affine_connection": True},
        {"hf_hook_point_out": "model.layers.13.output"},
        {"architecture": "topk"},
        {"hf_hook_point_in": "model.layers.12.self_attn.o_proj.input"},
    ):
        (folder / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(VectorFileError, match=r"config\.json: "):
            load_gemma_scope(folder, PICKED)


def test_a_dictionary_of_40_gb_takes_little_memory(tmp_path: Path) -> None:
    """A sparse file: its features are zeros, except the few that are written into it."""
    hidden, count = 4096, 1_200_000
    shapes = {"W_enc": (hidden, count), "W_dec": (count, hidden), "b_enc": (count,), "b_dec": (hidden,)}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    start = 8 + len(text)
    assert start + end > 39e9
    (tmp_path / "cfg.json").write_text(json.dumps(config(d_in=hidden, d_sae=count)))
    features = [1_199_999, 17, 600_000]
    with (tmp_path / "sae_weights.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + end)
        for feature in features:
            file.seek(start + 4 * (4000 * count + feature))
            file.write(struct.pack("<f", feature))
            file.seek(start + header["W_dec"]["data_offsets"][0] + 4 * hidden * feature)
            file.write(struct.pack("<f", feature + 0.5))
    tracemalloc.start()
    rows = load_saelens(tmp_path, features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for feature in features:
        row = rows.row(3, feature)
        assert (row.read[4000], np.count_nonzero(row.read)) == (feature, 1)
        assert (row.write[0], np.count_nonzero(row.write)) == (feature + 0.5, 1)
    assert peak < 20 * rows.num_bytes < 2_500_000


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def npy(array: np.ndarray, **kwargs: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **kwargs)
    return out.getvalue()


GOOD = {f"{name}.npy": npy(array) for name, array in weights("b_enc", "threshold").items()}


def declared(text: str, data: bytes = b"") -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


ATTACKS: dict[str, tuple[bytes, str]] = {
    "not a zip": (b"hello", "not an .npz file"),
    "an empty archive": (archive({}), "no tensor W_enc"),
    "a pickled array": (archive(GOOD | {"W_enc.npy": npy(np.array([None, 1]), allow_pickle=True)}), "dtype '|O'"),
    "integers": (archive(GOOD | {"W_enc.npy": npy(np.ones((D, F), int))}), "no tensor W_enc of floats"),
    "big-endian": (archive(GOOD | {"W_enc.npy": npy(np.ones((D, F), ">f4"))}), "little-endian floats"),
    "long doubles": (archive(GOOD | {"W_enc.npy": npy(np.ones((D, F), np.longdouble))}), "little-endian floats"),
    "a header with code": (
        archive(GOOD | {"W_enc.npy": declared("{'descr': '<f4', 'fortran_order': False, 'shape': (exit(),)}")}),
        "no valid header",
    ),
    "a huge shape": (
        archive(GOOD | {"W_enc.npy": declared(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40}, 4)}}")}),
        "its shape needs",
    ),
    "a negative shape": (
        archive(
            GOOD | {"W_enc.npy": declared("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}", b"\0" * 16)}
        ),
        "W_enc needs|hidden size|needs",
    ),
    **{
        f"a header that begins {text[:8]!r}": (archive(GOOD | {"W_enc.npy": declared(text)}), "no valid header")
        for text in ("{'descr': (", "{[]: 1}", "'''", "  x\n y", "{1: 2, 'a': 3}")
    },
    "no array header": (archive(GOOD | {"W_enc.npy": b"nothing"}), "no valid header"),
    "a scalar": (archive(GOOD | {"W_enc.npy": npy(np.float32(1))}), r"shape \[\]"),
    "three dimensions": (archive(GOOD | {"W_enc.npy": npy(np.ones((D, F, 1), "f"))}), r"\[D, features\] is needed"),
    "a bomb": (
        archive(GOOD | {"W_enc.npy": npy(np.zeros((D, 1 << 20), np.float32))}, zipfile.ZIP_DEFLATED),
        "expands from",
    ),
    "many members": (archive({f"{i}.npy": npy(np.ones(1)) for i in range(65)}), "at most 64"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_with_its_own_sentence(tmp_path: Path, name: str) -> None:
    data, sentence = ATTACKS[name]
    (tmp_path / "params.npz").write_bytes(data)
    with pytest.raises(VectorFileError, match=sentence) as caught:
        load_gemma_scope(tmp_path / "params.npz", PICKED, block=1)
    assert str(tmp_path) in caught.value.message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_vector_file_error_or_features(tmp_path: Path, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    good = archive(GOOD, method)
    at = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.integers(0, len(good)))
    byte = bytes([data.draw(st.integers(0, 255))])
    for damaged in (good[:at] + byte + good[at + 1 :], good[:cut], good[:at] + good[cut:]):
        (tmp_path / "params.npz").write_bytes(damaged)
        try:
            load_gemma_scope(tmp_path / "params.npz", PICKED, block=1)
        except VectorFileError:
            continue


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_saelens_weights(tmp_path: Path, data: st.DataObject) -> None:
    folder = saelens(tmp_path / "sae", weights("b_enc"))
    file = folder / "sae_weights.safetensors"
    good = file.read_bytes()
    at = data.draw(st.integers(0, min(600, len(good) - 1)))
    byte = bytes([data.draw(st.integers(0, 255))])
    cut = data.draw(st.integers(0, len(good)))
    for damaged in (good[:at] + byte + good[at + 1 :], good[:cut], good[:at] + good[cut:]):
        file.write_bytes(damaged)
        try:
            load_saelens(folder, PICKED)
        except VectorFileError:
            continue
