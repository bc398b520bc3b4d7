"""Imports chosen features of sparse autoencoders, and writes them as SAELens does.

| kind | files |
|---|---|
| saelens | a folder with `cfg.json` and `sae_weights.safetensors` |
| gemma-scope | `params.npz`, or a folder with `config.json` and `params.safetensors`; JumpReLU |

The tensors are W_enc `[D, F]`, W_dec `[F, D]`, b_enc `[F]`, b_dec `[D]` and threshold `[F]`: F features, hidden size D.
Only the chosen rows are read. What an autoencoder does to x before it multiplies is folded into the bias, so that every
feature is relu(<x, read> + bias), above its threshold if it has one.
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
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE, MAX_TEXT, VectorMetadata, parse_json_object
from steer_engine.vectors.row_set import MAX_INDEX, MAX_ROW_SET_BYTES, MAX_ROWS, RowSet
from steer_engine.vectors.safetensors_format import joined
from steer_engine.vectors.storage import read_vector_file, write_atomically
from steer_engine.vectors.stored_tensors import Floats, StoredTensor, open_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
MAX_CONFIG_BYTES = 1 << 20

_NUMBERS = {"standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
"""Architectures of SAELens whose features depend on their own rows only, and what they have per feature."""

_NOT_ALONE = {
    "topk": "a top-k feature is active only among the k largest of all features, which one row cannot tell",
    "batchtopk": "save the inference model, which SAELens writes as jumprelu",
    "matryoshka_batchtopk": "save the inference model, which SAELens writes as jumprelu",
}
_TRANSCODER = "a transcoder reads and writes at different places; only autoencoders of the residual stream are read."

_BLOCK_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")
_MODULE_HOOK = re.compile(r"(?:[a-z_]{1,32}\.){0,3}(?:layers|h)\.(\d{1,4})(?:\.output)?")
_LAYER = re.compile(r"layer_(\d{1,4})(?:_.*)?")
_OTHER_SITE = re.compile(r"(?:^|[-_/])(attn?|mlp|transcoders?|crosscoders?|embedding)(?:[-_/]|$)")


def load_saelens(folder: Path, features: Sequence[int], block: int | None = None) -> RowSet:
    """Features of a SAELens autoencoder with ReLU or JumpReLU, or a gated one.

    Args:
        features: their numbers in the dictionary.
        block: for a configuration without `hook_name`: features of the output of this block.

    Raises:
        VectorFileError: the folder is not one, or its features cannot be computed one by one from the residual stream.
    """
    config = _flat(read_config(folder / CONFIG))
    where = str(folder / CONFIG)
    _check_saelens(config, where)
    block = _block_of(config.get("hook_name"), block, where)
    architecture = config["architecture"]
    with open_tensors(folder / WEIGHTS) as tensors:
        chosen = _Chosen(tensors, features, _NUMBERS[architecture])
        read, write, vectors = chosen.read, chosen.write, chosen.numbers
        centre = chosen.centre if config.get("apply_b_dec_to_input", True) else None
        scale = chosen.optional("scaling_factor", "finetuning_scaling_factor")
    if scale is not None and not (scale == 1).all():
        if not config.get("finetuning_scaling_factor"):
            raise VectorFileError(
                f"{where}: the weights have a scaling factor, which the configuration does not mention."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            write = write * scale[:, None]
    notes = []
    threshold: Any
    with np.errstate(over="ignore", invalid="ignore"):  # a row set checks that its values are finite
        if architecture == "gated":
            grown = np.exp(vectors["r_mag"].astype(np.float64))
            bias = vectors["b_mag"] - grown * _dots(read, centre)
            # The gate <x, e> + b_gate > 0 is grown * <x, e> + b_mag > b_mag - grown * b_gate.
            threshold = vectors["b_mag"] - grown * vectors["b_gate"]
            read = (read * grown[:, None]).astype(np.float32)
            notes.append("The gates were turned into thresholds.")
        else:
            bias = vectors["b_enc"] - _dots(read, centre)
            threshold = vectors.get("threshold")
    extra = {"neuronpedia_id": str(config["neuronpedia_id"])[:MAX_TEXT]} if config.get("neuronpedia_id") else {}
    metadata = {"model": str(config.get("model_name") or "")[:MAX_TEXT], "extra": extra, "notes": " ".join(notes)}
    return _row_set(block, features, read, write, bias, threshold, metadata)


def load_gemma_scope(path: Path, features: Sequence[int], block: int | None = None) -> RowSet:
    """Features of Gemma Scope (`params.npz`) or Gemma Scope 2 (`params.safetensors` with `config.json`), JumpReLU.

    `params.npz` does not say its block. It is taken from the folder's name (`layer_20/width_16k/...`), unless `block`
    says it. Raises VectorFileError as `load_saelens` does.
    """
    if path.is_dir():
        path = next((each for each in (path / "params.npz", path / "params.safetensors") if each.exists()), path)
    folders = "/".join(path.absolute().parts[-5:-1])
    config_file = path.with_name("config.json")
    model = ""
    if config_file.exists():
        config = _flat(read_config(config_file))
        hooks = [config.get(name) for name in ("hf_hook_point_in", "hf_hook_point_out")]
        if config.get("affine_connection") or hooks[1] not in (None, hooks[0]):
            raise VectorFileError(f"{config_file}: {_TRANSCODER}")
        if str(config.get("architecture", "jump_relu")) != "jump_relu":
            raise VectorFileError(f"{config_file}: architecture {shown(config['architecture'])} is not jump_relu.")
        block, model = _block_of(hooks[0], block, str(config_file)), str(config.get("model_name") or "")[:MAX_TEXT]
    elif block is None:
        if (other := _OTHER_SITE.search(folders)) is not None:
            raise VectorFileError(
                f"{path}: the folder says {other[1]!r}; only features of the residual stream are read. If these are, "
                "say at the output of which block: --block N."
            )
        found = [match[1] for part in folders.split("/") if (match := _LAYER.fullmatch(part))]
        if len(found) != 1:
            raise VectorFileError(f"{path}: no folder layer_N says the block; say it with --block N.")
        block = int(found[0])
    with open_tensors(path) as tensors:
        names = {name[:2].replace("w_", "W_") + name[2:]: tensor for name, tensor in tensors.items()}
        chosen = _Chosen(names, features, ("b_enc", "threshold"))
        read, write, vectors = chosen.read, chosen.write, chosen.numbers
    return _row_set(block, features, read, write, vectors["b_enc"], vectors["threshold"], {"model": model, "notes": ""})


class _Chosen:
    """The rows of some features, read from the tensors of an autoencoder. All shapes are checked first."""

    def __init__(self, tensors: Mapping[str, StoredTensor], features: Sequence[int], names: Sequence[str]) -> None:
        for name in ("W_enc", "W_dec", *names):
            if name not in tensors:
                raise VectorFileError(f"there is no tensor {name} of floats.")
        if len(tensors["W_enc"].shape) != 2:
            raise VectorFileError(f"W_enc has shape {list(tensors['W_enc'].shape)}; [D, features] is needed.")
        hidden_size, count = tensors["W_enc"].shape
        shapes = {"W_dec": (count, hidden_size), **dict.fromkeys(names, (count,))}
        if "b_dec" in tensors:
            shapes["b_dec"] = (hidden_size,)
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise VectorFileError(f"{name} has shape {list(tensors[name].shape)}; W_enc needs {list(shape)}.")
        if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
            raise VectorFileError(f"the hidden size is {hidden_size}; at most {MAX_HIDDEN_SIZE} is read.")
        check_features(features)
        if 8 * hidden_size * len(features) > MAX_ROW_SET_BYTES:
            raise VectorFileError(f"{len(features)} features need more than {MAX_ROW_SET_BYTES} bytes; choose fewer.")
        if max(features) >= count:
            raise VectorFileError(f"there is no feature {max(features)}; it has 0 to {count - 1}.")
        self._tensors, self._features, self._count = tensors, features, count
        self.read = tensors["W_enc"].columns(features)
        self.write = tensors["W_dec"].rows(features)
        self.numbers = {name: tensors[name].rows(features) for name in names}
        self.centre = tensors["b_dec"].whole() if "b_dec" in tensors else None

    def optional(self, *names: str) -> Floats | None:
        """The numbers of the first tensor `[features]` of these names that exists."""
        for name in names:
            if name in self._tensors:
                if self._tensors[name].shape != (self._count,):
                    raise VectorFileError(
                        f"{name} has shape {list(self._tensors[name].shape)}; [{self._count}] is needed."
                    )
                return self._tensors[name].rows(self._features)
        return None


def check_features(features: Sequence[int]) -> None:
    """Raise VectorFileError unless these are different numbers of features, not too many."""
    if not features:
        raise VectorFileError(
            "Name the features to import, such as --features 12,345; a whole dictionary is never read."
        )
    if len(features) > MAX_ROWS:
        raise VectorFileError(f"{len(features)} features are too many; at most {MAX_ROWS} fit into one file.")
    if len(set(features)) < len(features):
        raise VectorFileError("A feature is named twice.")
    if min(features) < 0 or max(features) > MAX_INDEX:
        raise VectorFileError(f"Features are numbered from 0 to {MAX_INDEX}.")


def save_saelens(rows: RowSet, folder: Path) -> None:
    """Write the features of one block as a SAELens autoencoder with these features only, numbered from 0.

    Raises:
        VectorFileError: a low-rank edit, or features of several blocks.
    """
    if rows.kind != "features" or len(rows.blocks) != 1:
        raise VectorFileError("A SAELens folder holds features of one block; restrict the file to one block first.")
    (block,) = rows.blocks
    jump = block in rows.threshold
    tensors = {
        "W_enc": rows.read[block].T,
        "W_dec": rows.write[block],
        "b_enc": rows.bias[block],
        "b_dec": np.zeros(rows.hidden_size, np.float32),
        **({"threshold": rows.threshold[block]} if jump else {}),
    }
    hook = f"blocks.{block}.hook_resid_post"
    config = {
        "architecture": "jumprelu" if jump else "standard",
        "d_in": rows.hidden_size,
        "d_sae": rows.count(block),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": rows.metadata.model,
            "hook_name": hook,
            "sae_lens_version": "6.0.0",
            "original_features": list(rows.numbers(block)),
        },
    }
    encoded = {name: ("F32", array.shape, array.astype("<f4").tobytes()) for name, array in tensors.items()}
    write_atomically(folder / WEIGHTS, joined({"format": "pt"}, encoded))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2).encode())


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises VectorFileError, which names the file."""
    data = read_vector_file(path, MAX_CONFIG_BYTES)
    try:
        return parse_json_object(data.decode("utf-8"), "the configuration")
    except UnicodeDecodeError:
        raise VectorFileError(f"{path}: not UTF-8.") from None
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error.message}") from None


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as one flat object: SAELens 6 keeps what it is for in an inner one."""
    inner = [config[name] for name in ("metadata", "meta") if isinstance(config.get(name), dict)]
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    flat: dict[str, Any] = {}
    for part in (*inner, config):
        flat |= {renamed.get(key, key): value for key, value in part.items() if value is not None}
    flat.setdefault("architecture", "standard")
    return flat


def _check_saelens(config: Mapping[str, Any], where: str) -> None:
    """Raise VectorFileError unless each feature is a function of x by its own rows, and x is the residual stream."""
    architecture = config["architecture"]
    if (activation := config.get("activation_fn", "relu")) not in ("relu", architecture):
        reason = _NOT_ALONE.get(str(activation), "readable is ReLU")
        raise VectorFileError(f"{where}: features of {shown(activation)} cannot be imported: {reason}.")
    if not isinstance(architecture, str) or architecture not in _NUMBERS:
        reason = _NOT_ALONE.get(str(architecture), f"readable are {', '.join(_NUMBERS)} with ReLU")
        raise VectorFileError(f"{where}: features of {shown(architecture)} cannot be imported: {reason}.")
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", False):
        fix = (
            "load it in SAELens, call fold_activation_norm_scaling_factor(factor), and save it again"
            if normalised in ("expected_average_only_in", True)
            else "each row is divided by its own norm, which a read row cannot do"
        )
        raise VectorFileError(f"{where}: normalize_activations is {shown(normalised)}: {fix}.")
    if config.get("reshape_activations", "none") not in ("none", False):
        raise VectorFileError(f"{where}: it reads attention heads, not the residual stream.")
    if config.get("d_out") not in (None, config.get("d_in")) or config.get("hook_name_out") not in (
        None,
        config.get("hook_name"),
    ):
        raise VectorFileError(f"{where}: {_TRANSCODER}")


def _block_of(hook: Any, block: int | None, where: str) -> int:
    """The block whose output the hook reads. `block` is used if there is no hook, and must agree otherwise."""
    if hook is None:
        if block is None:
            raise VectorFileError(f"{where}: it does not say which block it reads; say it with --block N.")
        found = block
    elif (match := _BLOCK_HOOK.fullmatch(str(hook))) is not None:
        found = int(match[1]) - (match[2] == "pre")
        if found < 0:
            raise VectorFileError(f"{where}: {hook} is the embeddings, which are not the output of a block.")
    elif (match := _MODULE_HOOK.fullmatch(str(hook))) is not None:
        found = int(match[1])
    else:
        raise VectorFileError(
            f"{where}: it reads {shown(hook)}; only the residual stream between blocks can be edited."
        )
    if block not in (None, found):
        raise VectorFileError(
            f"{where}: {shown(hook)} is the output of block {found}, not of {block}; leave out --block."
        )
    if not 0 <= found < MAX_BLOCKS:
        raise VectorFileError(f"{where}: block {found} is not usable; valid are 0 to {MAX_BLOCKS - 1}.")
    return found


def _dots(read: Floats, centre: Floats | None) -> Any:
    """<centre, e> of each row, in float64; 0 without a centre."""
    if centre is None:
        return 0.0
    return read.astype(np.float64) @ centre.astype(np.float64)


def _row_set(
    block: int,
    features: Sequence[int],
    read: Floats,
    write: Floats,
    bias: Any,
    threshold: Any,
    metadata: Mapping[str, Any],
) -> RowSet:
    def narrow(numbers: Any) -> Floats:
        with np.errstate(over="ignore"):  # a row set checks that its values are finite
            return np.asarray(numbers).astype(np.float32)

    return RowSet(
        kind="features",
        read={block: read},
        write={block: write},
        bias={block: narrow(bias)},
        threshold={} if threshold is None else {block: narrow(threshold)},
        indices={block: np.array(features, np.int64)},
        metadata=VectorMetadata.checked({"method": "sae", **metadata}),
    )
