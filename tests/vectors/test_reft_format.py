"""Low-rank edits in the layouts of pyreft, pyvene and AxBench, written by torch, and compared with their formulas."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_engine.errors import VectorFileError
from steer_engine.site import Site
from steer_engine.vectors import RowSet, VectorMetadata, torch_format
from steer_engine.vectors.reft_format import load_axbench, load_reft, save_reft
from steer_engine.vectors.torch_format import NotOnlyTensorsError

D, K = 6, 2
X_ND = torch.randn(50, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def orthonormal() -> torch.Tensor:
    """`[D, k]`, as pyreft's `rotate_layer`."""
    return torch.linalg.qr(torch.randn(D, K, generator=generator()))[0]


def loreft(dtype: torch.dtype = torch.float32) -> OrderedDict[str, torch.Tensor]:
    """What LoreftIntervention.state_dict returns."""
    source = torch.nn.Linear(D, K).to(dtype)
    state = OrderedDict(source.state_dict().items())
    state["rotate_layer"] = torch.nn.Parameter(orthonormal()).data
    return state


class Noreft(torch.nn.Module):
    """The parameters and buffers of NoreftIntervention and NodireftIntervention."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("embed_dim", torch.tensor(D))
        self.register_buffer("interchange_dim", torch.tensor(D))
        self.proj_layer = torch.nn.Linear(D, K, bias=bias)
        self.learned_source = torch.nn.Linear(D, K)


def folder(path: Path, states: dict[int, list[Any]], kind: str, *, module_paths: bool = False) -> Path:
    """As IntervenableModel.save writes it. states: block -> the states of its interventions."""
    path.mkdir(exist_ok=True)
    representations = []
    for block, each in states.items():
        component = f"model.layers[{block}].output" if module_paths else "block_output"
        head = f"comp_model_layers[{block}]_output" if module_paths else f"layer_{block}_comp_block_output"
        for number, state in enumerate(each):
            representations.append(
                [block, component, "pos", 1, K, None, None, None, None, None, None, None, None, None]
            )
            torch.save(state, path / f"intkey_{head}_unit_pos_nunit_1#{number}.bin")
    config = {
        "representations": representations,
        "intervention_types": [f"<class 'pyreft.interventions.{kind}'>"] * len(representations),
        "mode": "parallel",
        "sorted_keys": [],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def applied(rows: RowSet, block: int) -> torch.Tensor:
    """x + R^T (W x + b - R x), in float64."""
    read, write = (torch.tensor(np.array(each[block])).double() for each in (rows.read, rows.write))
    return X_ND + (X_ND @ read.T + torch.tensor(np.array(rows.bias[block])).double() - X_ND @ write.T) @ write


def close(found: torch.Tensor, expected: torch.Tensor, eps: float = 2.0**-24) -> None:
    bound = eps * 64 * D
    assert (found - expected).abs().max() <= bound
    assert (expected - X_ND).abs().max() > 0.1


@pytest.mark.parametrize("module_paths", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loreft(tmp_path: Path, dtype: torch.dtype, module_paths: bool) -> None:
    states = {4: [loreft(dtype)], 11: [loreft(dtype)]}
    rows = load_reft(folder(tmp_path / "reft", states, "LoreftIntervention", module_paths=module_paths))
    assert (rows.kind, rows.blocks, rows.count(4)) == ("low_rank", (4, 11), K)
    assert rows.metadata.method == "LoreftIntervention"
    assert rows.metadata.notes == "act_fn is not saved; linear is assumed."
    for block, (state,) in states.items():
        wide = {name: tensor.double() for name, tensor in state.items()}
        rotate = wide["rotate_layer"]
        source = X_ND @ wide["weight"].T + wide["bias"]
        close(applied(rows, block), X_ND + (source - X_ND @ rotate) @ rotate.T)
        np.testing.assert_array_equal(rows.read[block], state["weight"].float().numpy())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["NoreftIntervention", "NodireftIntervention"])
def test_variants_without_an_orthogonal_matrix(tmp_path: Path, kind: str, bias: bool) -> None:
    module = Noreft(bias).double()
    rows = load_reft(folder(tmp_path / "reft", {2: [Noreft.state_dict(module.float())]}, kind))
    module = module.double()
    with torch.no_grad():
        source = module.learned_source(X_ND)
        moved = source - module.proj_layer(X_ND) if kind == "NoreftIntervention" else source
        close(applied(rows, 2), X_ND + moved @ module.proj_layer.weight)
    assert "R is not orthonormal" in rows.metadata.notes


def test_several_interventions_of_a_block_are_chosen_by_number(tmp_path: Path) -> None:
    first, second = loreft(), loreft()
    path = folder(tmp_path / "reft", {4: [first, second]}, "LoreftIntervention")
    with pytest.raises(VectorFileError, match="block 4 has 2 interventions; choose one with --part 0"):
        load_reft(path)
    for number, state in enumerate((first, second)):
        np.testing.assert_array_equal(load_reft(path, number).read[4], state["weight"].numpy())
    for part in (2, -1):
        with pytest.raises(VectorFileError, match=f"no part {part}; it has 0 to 1"):
            load_reft(path, part)


def test_a_parametrised_matrix_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class Direft(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotate_layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(K, D, bias=False))
            self.learned_source = torch.nn.Linear(D, K)

    path = folder(tmp_path / "reft", {4: [Direft().state_dict()]}, "DireftIntervention")
    with pytest.raises(VectorFileError, match=r"not the matrix\. In Python, save .*rotate_layer\.weight\.data"):
        load_reft(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(K, D)}, "is not a low-rank edit that can be read"),
        ({**loreft(), "bias": torch.ones(K + 1)}, "do not fit each other"),
        ({**loreft(), "rotate_layer": torch.ones(D + 1, K)}, "do not fit each other"),
        ({**loreft(), "weight": torch.full((K, D), torch.nan)}, "not finite"),
        (torch.ones(3), "one tensor"),
        ({**loreft(), "weight": "text"}, "tensors are needed"),
        ({**loreft(), "weight": torch.ones(K, D, dtype=torch.int64)}, "is not a low-rank edit"),
        ({"module": torch.nn.Linear(2, 2)}, r"Save an intervention's state_dict\(\)"),
    ],
)
def test_states_that_are_no_low_rank_edit(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(VectorFileError, match=message) as caught:
        load_reft(folder(tmp_path / "reft", {4: [state]}, "LoreftIntervention"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representations": None}, "no list of representations"),
        ({"intervention_types": []}, "no list of representations"),
        ({"representations": [], "intervention_types": []}, "0 interventions"),
        ({"representations": [[4, "mlp_output", "pos", 1]]}, "'mlp_output' of layer 4 is not the output of a block"),
        ({"representations": [[-1, "block_output", "pos", 1]]}, "not the output of a block"),
        ({"representations": [[0, "../../x.output", "pos", 1]]}, "not the output of a block"),
        ({"representations": [[4, "block_output", "h.pos", 1]]}, "is not \\[layer, component"),
        ({"representations": [[4]]}, "is not \\[layer, component"),
        ({"representations": ["text"]}, "is not \\[layer, component"),
        ({"intervention_types": [3]}, "is not a type of intervention"),
        ({"intervention_types": ["<class 'x.RotateIntervention'>"]}, "'RotateIntervention' with .* cannot be|is not"),
        ({"representations": [[5, "block_output", "pos", 1]]}, r"intkey_layer_5.*cannot be read"),
    ],
)
def test_configurations_that_are_not_of_low_rank_edits(tmp_path: Path, change: Any, message: str) -> None:
    path = folder(tmp_path / "reft", {4: [loreft()]}, "LoreftIntervention")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(VectorFileError, match=message):
        load_reft(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_an_unusable_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(VectorFileError, match=r"config\.json: "):
        load_reft(tmp_path)


def test_what_we_write_is_read_by_torch_and_back_exactly(tmp_path: Path) -> None:
    rows = load_reft(folder(tmp_path / "reft", {4: [loreft()], 7: [loreft()]}, "LoreftIntervention"))
    save_reft(rows, tmp_path / "out")
    assert load_reft(tmp_path / "out") == rows
    state = torch.load(tmp_path / "out" / "intkey_layer_4_comp_block_output_unit_pos_nunit_1#0.bin", weights_only=True)
    assert state.keys() == {"weight", "bias", "rotate_layer"}
    assert state["rotate_layer"].shape == (D, K)
    np.testing.assert_array_equal(state["weight"].numpy(), rows.read[4])
    with pytest.raises(VectorFileError, match="not orthonormal"):
        save_reft(RowSet(kind="low_rank", read=rows.read, write=rows.read), tmp_path / "skew")
    with pytest.raises(VectorFileError, match="this file has features"):
        save_reft(RowSet(kind="features", read=rows.read, write=rows.read), tmp_path / "features")
    of_mlp = RowSet(
        kind="low_rank", read=rows.read, write=rows.write, bias=rows.bias, metadata=VectorMetadata(site=Site.MLP)
    )
    assert of_mlp.digest != rows.digest
    with pytest.raises(VectorFileError, match="for block outputs; these are of site 'mlp'"):
        save_reft(of_mlp, tmp_path / "mlp")


def test_build_changes_nothing_but_the_state_of_a_module(tmp_path: Path) -> None:
    """BUILD sets attributes of any object. On a described tensor it could move the view out of its storage."""
    torch.save({"v": torch.ones(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(each for each in members if each.endswith("data.pkl"))
    # Before the end of the tensor's SETITEM: an empty dict as the state of the object below.
    assert members[name].endswith(b"s.")
    members[name] = members[name][:-2] + b"}X\x05\x00\x00\x00shapeK\x63sbs."
    with zipfile.ZipFile(tmp_path / "bad.pt", "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with pytest.raises(NotOnlyTensorsError, match="contains more than tensors"):
        torch_format.load(tmp_path / "bad.pt")


def test_the_state_of_a_module_is_read(tmp_path: Path) -> None:
    module = Noreft()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    with pytest.raises(VectorFileError, match="tensor of long"):
        torch_format.load(tmp_path / "state.pt")
    read = torch_format.load(tmp_path / "state.pt", whole_numbers=True)
    assert read["embed_dim"] is None
    np.testing.assert_array_equal(read["proj_layer.weight"], module.proj_layer.weight.detach().numpy())


KEY = "comp_model_layers[20]_output_unit_pos_nunit_1#0"


def axbench(path: Path, **changes: Any) -> Path:
    """As AxBench's LoReFT writes 3 concepts."""
    weight = {
        f"{KEY}.proj_weight": torch.stack([orthonormal() for _ in range(3)]),
        f"{KEY}.source_weight": torch.randn(3, D, K, generator=generator()),
    }
    bias = {f"{KEY}.bias": torch.randn(3, K, generator=generator())}
    torch.save(weight | changes, path / "LoReFT_weight.pt")
    torch.save(bias, path / "LoReFT_bias.pt")
    return path / "LoReFT_weight.pt"


def test_axbench_loreft(tmp_path: Path) -> None:
    path = axbench(tmp_path)
    rows = load_axbench(path, [1])
    assert (rows.kind, rows.blocks, rows.metadata.notes) == ("low_rank", (20,), "Concept 1.")
    weight, bias = torch.load(path), torch.load(tmp_path / "LoReFT_bias.pt")
    rotate, source = (weight[f"{KEY}.{name}"][1].double() for name in ("proj_weight", "source_weight"))
    expected = X_ND + (X_ND @ source + bias[f"{KEY}.bias"][1].double() - X_ND @ rotate) @ rotate.T
    close(applied(rows, 20), expected)
    with pytest.raises(VectorFileError, match="of one concept; name one with --features"):
        load_axbench(path, [0, 1])
    with pytest.raises(VectorFileError, match="no concept 3; it has 0 to 2"):
        load_axbench(path, [3])
    with pytest.raises(VectorFileError, match=r"needs weights \[concepts, D, k\] twice"):
        load_axbench(axbench(tmp_path, **{f"{KEY}.source_weight": torch.ones(3, D, K + 1)}), [1])


def test_axbench_directions(tmp_path: Path) -> None:
    weight, bias = torch.randn(5, D), torch.randn(5)
    torch.save(weight, tmp_path / "DiffMean_weight.pt")
    torch.save(bias, tmp_path / "DiffMean_bias.pt")
    path = tmp_path / "DiffMean_weight.pt"
    rows = load_axbench(path, [4, 2], block=20)
    assert (rows.kind, rows.blocks, rows.metadata.method) == ("features", (20,), "DiffMean")
    np.testing.assert_array_equal(rows.row(20, 4).read, weight[4].numpy())
    np.testing.assert_array_equal(rows.row(20, 4).write, weight[4].numpy())
    assert rows.row(20, 2).bias == bias[2].item()
    with pytest.raises(VectorFileError, match="say it with --block N"):
        load_axbench(path, [4])
    with pytest.raises(VectorFileError, match="no concept 5; it has 0 to 4"):
        load_axbench(path, [5], block=20)
    with pytest.raises(VectorFileError, match="ends in _weight.pt"):
        load_axbench(tmp_path / "DiffMean_bias.pt", [4], block=20)
