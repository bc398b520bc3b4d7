"""Imports trained low-rank edits: folders of pyvene and pyreft, and the weights of AxBench; and writes pyreft's.

| kind | file | tensors | formula |
|---|---|---|---|
| reft | `intkey_{key}.bin` of a LoreftIntervention | rotate_layer `[D, k]`, weight `[k, D]`, bias `[k]` | LoReFT |
| reft | of a NoreftIntervention | proj_layer.*, learned_source.* | x + P^T (W x + b - P x - c) |
| reft | of a NodireftIntervention | the same | x + P^T (W x + b), read as W + P |
| axbench | `LoReFT_weight.pt`, `LoReFT_bias.pt` | {key}.proj_weight `[C, D, k]`, source_weight, bias | LoReFT |
| axbench | another `*_weight.pt`, `*_bias.pt` | `[C, D]` and `[C]` | features, read = write |

A key is `layer_{l}_comp_block_output_unit_pos_nunit_1#0`, or has a module's path: `comp_model_layers[{l}]_output_`...
`config.json` of a pyvene or pyreft folder names the types and the places. C is the number of concepts.

pyreft does not save `act_fn`, so that a file of one that is not linear cannot be told from a linear one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steer_engine.errors import VectorFileError
from steer_engine.fields import shown
from steer_engine.site import Site
from steer_engine.vectors import torch_format
from steer_engine.vectors.metadata import MAX_BLOCKS, VectorMetadata
from steer_engine.vectors.row_set import ORTHONORMAL_BOUND, RowSet
from steer_engine.vectors.sae_formats import check_features, read_config
from steer_engine.vectors.storage import write_atomically
from steer_engine.vectors.torch_format import Array, NotOnlyTensorsError

CONFIG = "config.json"
MAX_INTERVENTIONS = 4 * MAX_BLOCKS
MAX_UNITS = 1_000_000
"""Positions of one intervention. The number is part of a file's name."""

_TYPE = re.compile(r"(?:<class ')?(?:[\w.]+\.)?(\w+?)(?:'>)?")
_KEY = re.compile(r"layer_(\d{1,4})_comp_block_output_unit_pos_nunit_\d+#(\d{1,3})")
_MODULE_KEY = re.compile(r"comp_(?:\w+_)?(?:layers|h)\[(\d{1,4})\]_output_unit_pos_nunit_\d+#(\d{1,3})")
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)\[(\d{1,4})\]\.output")
_PARAMETRISED = "rotate_layer.parametrizations"


def load_reft(folder: Path, part: int | None = None) -> RowSet:
    """The interventions of a pyvene or pyreft folder on outputs of blocks.

    part: which one, from 0, where a block has several, such as one for the first and one for the last tokens.

    Raises:
        VectorFileError: not such a folder, or its interventions are no low-rank edits of block outputs.
    """
    where = folder / CONFIG
    config = read_config(where)
    representations, types = config.get("representations"), config.get("intervention_types")
    if not isinstance(representations, list) or not isinstance(types, list) or len(types) != len(representations):
        raise VectorFileError(f"{where}: it has no list of representations with as many intervention_types.")
    if not 1 <= len(types) <= MAX_INTERVENTIONS:
        raise VectorFileError(f"{where}: {len(types)} interventions; 1 to {MAX_INTERVENTIONS} are read.")
    found: dict[int, list[tuple[str, str]]] = {}
    for representation, kind in zip(representations, types, strict=True):
        block, prefix = _place(representation, where)
        match = _TYPE.fullmatch(kind) if isinstance(kind, str) else None
        if match is None:
            raise VectorFileError(f"{where}: {shown(kind)} is not a type of intervention.")
        same = found.setdefault(block, [])
        same.append((f"{prefix}#{sum(prefix == key.partition('#')[0] for key, _ in same)}", match[1]))
    parts: dict[str, dict[int, Array]] = {"read": {}, "write": {}, "bias": {}}
    kinds = set()
    for block, each in sorted(found.items()):
        if part is None and len(each) > 1:
            raise VectorFileError(f"{where}: block {block} has {len(each)} interventions; choose one with --part 0.")
        if not 0 <= (part or 0) < len(each):
            raise VectorFileError(f"{where}: block {block} has no part {part}; it has 0 to {len(each) - 1}.")
        key, kind = each[part or 0]
        kinds.add(kind)
        file = folder / f"intkey_{key}.bin"
        for name, array in zip(parts, _rows_of(_state(file), kind, file), strict=True):
            parts[name][block] = array
    rows = RowSet(kind="low_rank", read=parts["read"], write=parts["write"], bias=parts["bias"])
    notes = " ".join(["act_fn is not saved; linear is assumed.", *_skew(rows)])
    return rows.with_metadata(method="+".join(sorted(kinds)), notes=notes)


def load_axbench(path: Path, features: Sequence[int], block: int | None = None) -> RowSet:
    """Concepts of AxBench's `*_weight.pt`, with `*_bias.pt` beside it.

    A LoReFT file gives the low-rank edit of one concept. Any other gives features: the activation is
    relu(<x, direction> + bias), as AxBench's detectors compute it, and the write row is the direction.

    Args:
        features: numbers of the concepts; one for LoReFT.
        block: of the directions, which a file does not say. The keys of LoReFT say it.

    Raises:
        VectorFileError: not such files.
    """
    if not path.name.endswith("_weight.pt"):
        raise VectorFileError(f"{path}: AxBench's weights are in a file whose name ends in _weight.pt.")
    weights, biases = _state(path), _state(path.with_name(path.name.removesuffix("_weight.pt") + "_bias.pt"))
    check_features(features)
    if isinstance(weights, Mapping) and isinstance(biases, Mapping):
        return _concept(weights, biases, features, path)
    if block is None:
        raise VectorFileError(f"{path}: it does not say the block of the directions; say it with --block N.")
    if (
        isinstance(weights, Mapping)
        or isinstance(biases, Mapping)
        or weights.ndim != 2
        or biases.shape != weights.shape[:1]
    ):
        raise VectorFileError(f"{path}: a tensor [concepts, D] and biases [concepts] are needed.")
    if max(features) >= len(weights):
        raise VectorFileError(f"{path}: there is no concept {max(features)}; it has 0 to {len(weights) - 1}.")
    chosen = list(features)
    directions = {block: weights[chosen]}
    metadata = VectorMetadata(method=path.name.removesuffix("_weight.pt")[:64])
    bias, indices = {block: biases[chosen]}, {block: np.array(chosen)}
    return RowSet(kind="features", read=directions, write=directions, bias=bias, indices=indices, metadata=metadata)


def save_reft(rows: RowSet, folder: Path) -> None:
    """Write low-rank edits as a pyreft folder of LoreftIntervention.

    Raises:
        VectorFileError: features; or rows that LoReFT cannot have, because they are not orthonormal.
    """
    if rows.kind != "low_rank":
        raise VectorFileError("A pyreft folder holds low-rank edits; this file has features.")
    if rows.metadata.site is not Site.BLOCK:
        raise VectorFileError(f"Edits are exported for block outputs; these are of site {rows.metadata.site.value!r}.")
    for block in rows.blocks:
        if (error := rows.orthonormality_error(block)) > ORTHONORMAL_BOUND:
            raise VectorFileError(
                f"Block {block}: the rows of R are not orthonormal ({error:.2g}), as LoReFT's must be."
            )
    representations = []
    for block in rows.blocks:
        key = f"layer_{block}_comp_block_output_unit_pos_nunit_1#0"
        state = {"weight": rows.read[block], "bias": rows.bias[block], "rotate_layer": rows.write[block].T}
        write_atomically(folder / f"intkey_{key}.bin", torch_format.to_bytes(state))
        representations.append([block, "block_output", "pos", 1, rows.count(block), *[None] * 9])
    config = {
        "representations": representations,
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * len(rows.blocks),
        "intervention_dimensions": [None] * len(rows.blocks),
        "intervention_constant_sources": [True] * len(rows.blocks),
        "sorted_keys": [f"layer_{block}_comp_block_output_unit_pos_nunit_1#0" for block in rows.blocks],
        "mode": "parallel",
        "model_type": "None",
    }
    write_atomically(folder / CONFIG, json.dumps(config, indent=2).encode())


def _place(representation: Any, where: Path) -> tuple[int, str]:
    """The block of a representation, and its key without the number."""
    names = ("layer", "component", "unit", "max_number_of_units")
    if isinstance(representation, dict):
        values: list[Any] = [representation.get(name) for name in names]
    else:
        values = list(representation[:4]) if isinstance(representation, list) and len(representation) >= 4 else []
    is_one = len(values) == 4 and isinstance(values[1], str) and values[2] == "pos" and type(values[3]) is int
    if not is_one or not 0 < values[3] < MAX_UNITS:
        raise VectorFileError(f"{where}: a representation is not [layer, component, 'pos', units, ...].")
    layer, component, unit, count = values
    if component == "block_output" and type(layer) is int and 0 <= layer < MAX_BLOCKS:
        return layer, f"layer_{layer}_comp_block_output_unit_{unit}_nunit_{count}"
    if (match := _MODULE.fullmatch(component)) is not None and int(match[1]) < MAX_BLOCKS:
        return int(match[1]), f"comp_{component.replace('.', '_')}_unit_{unit}_nunit_{count}"
    raise VectorFileError(f"{where}: {shown(component)} of layer {shown(layer)} is not the output of a block.")


def _state(file: Path) -> Any:
    """The tensor or tensors of a file. Raises VectorFileError if they need code to load, or are not tensors."""
    try:
        state = torch_format.load(file, whole_numbers=True)
    except NotOnlyTensorsError as error:
        raise VectorFileError(f"{error.message} Save an intervention's state_dict(), not the object.") from None
    if not isinstance(state, dict):
        state_of = {"": state}
    else:
        state_of = {str(name): value for name, value in state.items() if value is not None}
    for name, value in state_of.items():
        if not isinstance(value, np.ndarray):
            raise VectorFileError(f"{file}: {shown(name)} is {type(value).__name__}; tensors are needed.")
    return state_of if isinstance(state, dict) else state


def _rows_of(state: Any, kind: str, file: Path) -> tuple[Array, Array, Array]:
    """Read rows, write rows and biases. Raises VectorFileError."""
    if not isinstance(state, Mapping):
        raise VectorFileError(f"{file}: one tensor; the state of an intervention is needed.")
    if kind == "LoreftIntervention" and state.keys() >= {"weight", "bias", "rotate_layer"}:
        read, write, bias = state["weight"], state["rotate_layer"].T, state["bias"]
    elif kind in ("NoreftIntervention", "NodireftIntervention") and state.keys() >= {
        "proj_layer.weight",
        "learned_source.weight",
        "learned_source.bias",
    }:
        read, write, bias = state["learned_source.weight"], state["proj_layer.weight"], state["learned_source.bias"]
        _check_shapes(read, write, bias, file)
        if kind == "NodireftIntervention":
            read = read + write
        elif "proj_layer.bias" in state:
            bias = bias - state["proj_layer.bias"].reshape(bias.shape)
    elif any(name.startswith(_PARAMETRISED) for name in state):
        raise VectorFileError(
            f"{file}: {shown(kind)} saves what its orthogonal matrix is computed from, not the matrix. In Python, save "
            "{'weight': W, 'bias': b, 'rotate_layer': intervention.rotate_layer.weight.data} instead, and name it "
            "LoreftIntervention in config.json."
        )
    else:
        raise VectorFileError(
            f"{file}: {shown(kind)} with {sorted(state)[:6]} is not a low-rank edit that can be read."
        )
    _check_shapes(read, write, bias, file)
    return read, write, bias


def _check_shapes(read: Array, write: Array, bias: Array, file: Path) -> None:
    if read.ndim != 2 or write.shape != read.shape or bias.shape != read.shape[:1]:
        raise VectorFileError(
            f"{file}: W {list(read.shape)}, R {list(write.shape)} and b {list(bias.shape)} do not fit each other; "
            "[k, D], [k, D] and [k] are needed."
        )


def _concept(weights: Mapping[str, Array], biases: Mapping[str, Array], features: Sequence[int], path: Path) -> RowSet:
    if len(features) != 1:
        raise VectorFileError(f"{path}: a low-rank edit is of one concept; name one with --features.")
    (concept,) = features
    parts: dict[str, dict[int, Array]] = {"read": {}, "write": {}, "bias": {}}
    for name in weights:
        key, _, what = name.rpartition(".")
        if what != "proj_weight":
            continue
        match = _KEY.fullmatch(key) or _MODULE_KEY.fullmatch(key)
        if match is None or int(match[1]) >= MAX_BLOCKS or int(match[1]) in parts["read"]:
            raise VectorFileError(f"{path}: {shown(key)} is not the only intervention on the output of a block.")
        write, read, bias = weights[name], weights.get(f"{key}.source_weight"), biases.get(f"{key}.bias")
        if (
            read is None
            or bias is None
            or write.ndim != 3
            or read.shape != write.shape
            or bias.shape != write.shape[::2]
        ):
            raise VectorFileError(
                f"{path}: {shown(key)} needs weights [concepts, D, k] twice, and biases [concepts, k]."
            )
        if concept >= len(write):
            raise VectorFileError(f"{path}: there is no concept {concept}; it has 0 to {len(write) - 1}.")
        block = int(match[1])
        parts["read"][block], parts["write"][block] = read[concept].T, write[concept].T
        parts["bias"][block] = bias[concept]
    if not parts["read"]:
        raise VectorFileError(f"{path}: it has no tensors KEY.proj_weight, as AxBench's LoReFT writes.")
    rows = RowSet(kind="low_rank", read=parts["read"], write=parts["write"], bias=parts["bias"])
    return rows.with_metadata(method="LoReFT", notes=" ".join([f"Concept {concept}.", *_skew(rows)]))


def _skew(rows: RowSet) -> list[str]:
    """A sentence if R is not orthonormal, so that the edit also scales x along R."""
    worst = max(rows.orthonormality_error(block) for block in rows.blocks)
    return [] if worst <= ORTHONORMAL_BOUND else [f"R is not orthonormal (off by {worst:.2g})."]
