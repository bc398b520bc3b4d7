"""Files of other tools. The tests write one of each kind; the value of a row is the block it must belong to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, RowSet, load, save
from steer_engine.vectors.importers import KINDS, Choice, import_vector, kind_of


class SteeringVector:
    """Replaces the class that the steering-vectors package pickles."""

    layer_activations: dict[int, torch.Tensor]


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def row(value: float) -> torch.Tensor:
    return torch.full((4,), float(value))


def test_notes_name_the_source_and_the_result_can_be_saved(tmp_path: Path) -> None:
    vector = ControlVector(directions={3: np.array([1.0, 2.0])})
    save(vector, tmp_path / "theirs.gguf")
    imported = import_vector(tmp_path / "theirs.gguf", "gguf", model="example/model")
    assert imported == vector
    assert imported.metadata.notes == "Imported from theirs.gguf (gguf)."
    assert imported.metadata.model == "example/model"
    save(imported, tmp_path / "ours.safetensors")
    assert load(tmp_path / "ours.safetensors").metadata == imported.metadata


def test_unknown_kinds_are_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="no kind 'pickle'.*gguf, caa, persona, refusal, layers, vllm-lens"):
        import_vector(tmp_path / "x.pt", "pickle")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "direction_metadata.json").write_text('{"layer": 1}')
    with pytest.raises(VectorFileError, match=r"vec_layer_1_gone\.pt: cannot be read"):
        import_vector(tmp_path / "vec_layer_1_gone.pt", kind)


def test_caa_layer_is_the_block(tmp_path: Path) -> None:
    for layer in (0, 13):
        torch.save(row(layer).to(torch.bfloat16), tmp_path / f"vec_layer_{layer}_Llama-2-7b-chat-hf.pt")
    one = import_vector(tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt", "caa")
    assert {block: v.tolist() for block, v in one.directions.items()} == {13: [13.0] * 4}
    folder = import_vector(tmp_path, "caa")
    assert {block: v[0] for block, v in folder.directions.items()} == {0: 0.0, 13: 13.0}
    assert folder.metadata.method == "diffmean"


def test_caa_names_must_contain_the_layer_and_be_of_one_model(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=r"has no file vec_layer_\*\.pt"):
        import_vector(tmp_path, "caa")
    torch.save(row(1), tmp_path / "vector.pt")
    with pytest.raises(VectorFileError, match="the name must contain the layer"):
        import_vector(tmp_path / "vector.pt", "caa")
    torch.save(row(1), tmp_path / "vec_layer_1_a.pt")
    torch.save(row(1), tmp_path / "vec_layer_1_b.pt")
    with pytest.raises(VectorFileError, match="two files for layer 1"):
        import_vector(tmp_path, "caa")


def test_persona_row_l_is_block_l_minus_1(tmp_path: Path) -> None:
    rows = torch.stack([row(value) for value in (100.0, 0.0, 1.0, 2.0, 200.0)])  # embeddings, 0, 1, 2, normed
    torch.save(rows, tmp_path / "evil_prompt_avg_diff.pt")
    vector = import_vector(tmp_path / "evil_prompt_avg_diff.pt", "persona")
    assert {block: v[0] for block, v in vector.directions.items()} == {0: 0.0, 1: 1.0, 2: 2.0}
    assert vector.metadata.num_blocks == 4
    torch.save(row(1), tmp_path / "flat.pt")
    with pytest.raises(VectorFileError, match=r"shape \[4\]; a tensor of 2"):
        import_vector(tmp_path / "flat.pt", "persona")
    torch.save(rows[:2], tmp_path / "short.pt")
    with pytest.raises(VectorFileError, match="2 rows"):
        import_vector(tmp_path / "short.pt", "persona")


def test_refusal_layer_l_is_block_l_minus_1(tmp_path: Path) -> None:
    torch.save(row(7).double(), tmp_path / "direction.pt")
    with pytest.raises(VectorFileError, match="the layer is unknown"):
        import_vector(tmp_path / "direction.pt", "refusal")
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -5, "layer": 14}))
    vector = import_vector(tmp_path / "direction.pt", "refusal")
    assert {block: v.tolist() for block, v in vector.directions.items()} == {13: [7.0] * 4}
    for layer in (0, -1, 1024, "14", True, 1.0):
        (tmp_path / "direction_metadata.json").write_text(json.dumps({"layer": layer}))
        with pytest.raises(VectorFileError, match="is not usable; valid are 1 to 1023"):
            import_vector(tmp_path / "direction.pt", "refusal")


def test_a_dict_of_layers(tmp_path: Path) -> None:
    torch.save({5: row(5), 2: row(2)}, tmp_path / "layers.pt")
    vector = import_vector(tmp_path / "layers.pt", "layers")
    assert {block: v[0] for block, v in vector.directions.items()} == {2: 2.0, 5: 5.0}
    for bad, sentence in (
        (row(1), "not a dict"),
        ({"5": row(1)}, "not a dict"),
        ({}, "at least one block"),
        ({5: torch.ones(2, 2)}, r"layers\.pt: .*shape \[2, 2\]"),
        ({5: torch.ones(2, dtype=torch.int64)}, "floating-point"),
        ({5: 1.0}, "contains float"),
        ({5: torch.tensor([float("nan")])}, "not finite"),
        ({5: torch.ones(1).expand(2**33)}, "is not a vector"),
    ):
        torch.save(bad, tmp_path / "layers.pt")
        with pytest.raises(VectorFileError, match=sentence):
            import_vector(tmp_path / "layers.pt", "layers")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Exploit(), tmp_path / "evil.pt")
    with pytest.raises(VectorFileError, match="could run any code"):
        import_vector(tmp_path / "evil.pt", "persona")
    assert not (tmp_path / "pwned").exists()


def test_steering_vectors_pickles_are_refused_with_an_export_command(tmp_path: Path) -> None:
    theirs = SteeringVector()
    theirs.layer_activations = {3: row(3)}
    torch.save(theirs, tmp_path / "v.pt")
    with pytest.raises(VectorFileError, match="export it as tensors with: python -c") as caught:
        import_vector(tmp_path / "v.pt", "layers")
    # The command in the message works.
    code = caught.value.message.partition('python -c "')[2].rstrip('"')
    code = code.replace("IN.pt", str(tmp_path / "v.pt")).replace("OUT.pt", str(tmp_path / "out.pt"))
    exec(code, {"__name__": "reexport"})
    assert import_vector(tmp_path / "out.pt", "layers").blocks == (3,)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x02.", b"PK\x03\x04" + b"\0" * 40])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vec_layer_1_x.pt").write_bytes(content)
    with pytest.raises(VectorFileError, match=r"vec_layer_1_x\.pt"):
        import_vector(tmp_path / "vec_layer_1_x.pt", "caa")


def steering_lite(path: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    """As `Vector.save` of steering-lite writes it."""
    config = {"method": "mean_diff", "layers": [3, 8], "target": "residual", "target_submodule": None, "coeff": 2.5}
    save_file(tensors, path, metadata={"cfg": json.dumps(config | changes)})
    return path


def test_steering_lite(tmp_path: Path) -> None:
    v = np.arange(4, dtype=np.float32)
    path = steering_lite(tmp_path / "v.safetensors", {"layer3.v": v, "layer8.v": v.astype(np.float16)})
    vector = import_vector(path, "auto")
    assert vector == ControlVector(directions={3: v, 8: v})
    assert vector.metadata.notes == "Imported from v.safetensors (steering-lite). Made for op 'add' with scale 2.5."
    for changes in ({"method": "sspace"}, {"target_submodule": "mlp.down_proj"}, {"method": ["x"]}):
        with pytest.raises(VectorFileError, match="is not one direction per block"):
            import_vector(steering_lite(path, {"layer3.v": v}, **changes), "steering-lite")
    for coefficient in (10**400, "2", None):
        with pytest.raises(VectorFileError, match="is not a number"):
            import_vector(steering_lite(path, {"layer3.v": v}, coeff=coefficient), "steering-lite")
    with pytest.raises(VectorFileError, match=r"v\.safetensors: Tensor 'layer3\.V' is not layer0\.v"):
        import_vector(steering_lite(path, {"layer3.V": np.ones((2, 4), np.float32)}), "steering-lite")
    with pytest.raises(VectorFileError, match="shape"):
        import_vector(steering_lite(path, {"layer3.v": np.ones((2, 4), np.float32)}), "steering-lite")


@pytest.mark.parametrize(
    "header",
    [
        '{"__metadata__":[]}',
        '{"__metadata__":{"cfg":3}}',
        '{"__metadata__":{"cfg":"{"}}',
        '{"__metadata__":{"cfg":"{\\"method\\":\\"pca\\"}"},"layer1.v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"__metadata__":{"cfg":"{\\"method\\":\\"pca\\"}"},"layer1024.v":{}}',
        '{"__metadata__":{"cfg":"{\\"method\\":\\"pca\\"}"}}',
    ],
)
def test_hostile_files_of_steering_lite(tmp_path: Path, header: str) -> None:
    data = len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4
    (tmp_path / "v.safetensors").write_bytes(data)
    with pytest.raises(VectorFileError, match=r"v\.safetensors: "):
        import_vector(tmp_path / "v.safetensors", "steering-lite")


def sae(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(1)
    shapes = {"W_enc": (4, 9), "W_dec": (9, 4), "b_enc": (9,), "b_dec": (4,)}
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"hook_name": "blocks.3.hook_resid_post"}))
    return folder


def test_features_are_chosen_and_labelled(tmp_path: Path) -> None:
    folder = sae(tmp_path / "sae")
    lines = [{"index": "5", "description": "praise"}, {"index": "5", "description": "later"}, {"index": "4"}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"index": 0, "description": "blame"}])))
    rows = import_vector(folder, "auto", model="m", choice=Choice(features=(5, 2), labels=tmp_path / "e.jsonl"))
    assert isinstance(rows, RowSet)
    assert rows.numbers(3) == (2, 5)
    assert rows.labels == {3: {5: "praise"}}
    assert (rows.metadata.model, rows.metadata.notes) == ("m", "Imported from sae (saelens).")


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("caa", Choice(features=(1,)), "--features has no meaning for caa; it is for saelens, gemma-scope, axbench"),
        ("reft", Choice(block=1), "--block has no meaning for reft"),
        ("saelens", Choice(part=0), "--part has no meaning for saelens; it is for reft"),
        ("axbench", Choice(labels=Path("x")), "--labels has no meaning for axbench"),
        ("saelens", Choice(), "--features 12,345"),
    ],
)
def test_a_choice_that_a_kind_would_ignore_is_refused(tmp_path: Path, kind: str, choice: Choice, message: str) -> None:
    with pytest.raises(VectorFileError, match=message):
        import_vector(sae(tmp_path / "sae"), kind, choice=choice)


def test_kinds_are_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "g.bin").write_bytes(b"GGUF")
    (tmp_path / "lens.json").write_text('[{"activations": {}}]')
    (tmp_path / "np.json").write_text('{"vector": {}}')
    (tmp_path / "params.npz").write_bytes(b"PK")
    (tmp_path / "DiffMean_weight.pt").write_bytes(b"PK")
    found = {each.name: kind_of(each) for each in tmp_path.iterdir()}
    assert found == {
        "g.bin": "gguf",
        "lens.json": "vllm-lens",
        "np.json": "neuronpedia",
        "params.npz": "gemma-scope",
        "DiffMean_weight.pt": "axbench",
    }
    assert kind_of(sae(tmp_path / "sae")) == "saelens"
    assert kind_of(tmp_path) == "gemma-scope"
    (tmp_path / "caa").mkdir()
    (tmp_path / "caa" / "vec_layer_3.pt").touch()
    assert kind_of(tmp_path / "caa") == "caa"
    (tmp_path / "x.pt").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "x.pt", "name it with --kind: gguf, caa"), (tmp_path / "empty", "has none of")):
        with pytest.raises(VectorFileError, match=message):
            kind_of(path)
    with pytest.raises(VectorFileError, match=r"give the folder, .*sae\."):
        kind_of(tmp_path / "sae" / "cfg.json")
    with pytest.raises(VectorFileError, match="cannot be read"):
        kind_of(tmp_path / "none.bin")
    save(ControlVector(directions={1: np.ones(3, np.float32)}), tmp_path / "ours.safetensors")
    with pytest.raises(VectorFileError, match="a file of Steer Engine already"):
        kind_of(tmp_path / "ours.safetensors")
