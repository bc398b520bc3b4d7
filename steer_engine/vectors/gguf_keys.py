"""What the keys of a GGUF control vector say about its use: which are descriptions, and which change the meaning.

llama.cpp adds the directions of such a file. A GLP file (GGUF Layer Projection, a convention on the same tensors) may
say `glp.mode = project` instead: its directions are to be removed, which is the operation `ablate` here. Added, they
would do the opposite, and nothing would look wrong. So a key that is not known to be a description is refused, unless
the caller says what to do about it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steer_engine.errors import VectorFileError
from steer_engine.fields import shown

Keys = Literal["added", "understood", "ignored"]
"""Which files a reader takes.

added: files whose directions are to be added, with no key of unknown meaning. Servers take only these.
understood: also files with another operation that this engine has; `ControlVector.metadata` then names it.
ignored: all files. Keys that are not understood are named in the notes.
"""

METADATA_KEY = "steer_engine.metadata"

IMPORT = "steer-engine vectors import FILE --kind gguf --out OUT.safetensors"

MODE, ALPHA, HOOK = "glp.mode", "glp.alpha_default", "glp.hook_point"
LAYERS, RANK, VERSION = "glp.layer_ids_zero_based", "glp.rank", "glp.spec_version"
PROJECT = "project"
OUR_HOOK = "residual_stream_post_layer"
"""The output of a block, which is where vectors apply here."""

_DESCRIPTION = re.compile(
    r"GGUF\.(version|tensor_count|kv_count)|general\..*|(controlvector|steeringvector)\.(model_hint|layer_count)|"
    r"glp\.(derived_at|content_sha256|created|method|contrast|orthonormal|base_model|base_revision)"
)
"""`GGUF.*` are not in the file: the gguf package lists the header under these names."""

_MAX_NAMED = 8
_MAX_VALUE = 1024


@dataclass(frozen=True, kw_only=True)
class Use:
    """What the keys say. extra: for the vector's metadata. notes: sentences for a person, "" if there is none."""

    extra: Mapping[str, str]
    notes: str


def use_of(values: Mapping[str, Any], blocks: Collection[int], keys: Keys) -> Use:
    """How the directions of a file are meant, from the values of its keys.

    blocks: the blocks that have a direction.

    Raises:
        VectorFileError: the file says what `keys` does not take. The message names the keys and the next step.
    """
    faults = _faults(values, blocks)
    named = "; ".join(list(faults.values())[:_MAX_NAMED])
    if len(faults) > _MAX_NAMED:
        named += f"; and {len(faults) - _MAX_NAMED} more"
    if faults and keys != "ignored":
        raise VectorFileError(
            f"The file says more than 'add these directions': {named}. If they may be used all the same, import the "
            f"file with: {IMPORT} --force"
        )
    notes = [f"Ignored in the file: {named}."] if faults else []
    if MODE not in values or MODE in faults:
        return Use(extra={}, notes=" ".join(notes))
    operation, scale = ("ablate" if values[MODE] == PROJECT else "add"), 1.0
    if ALPHA in values and ALPHA not in faults:
        scale = float(values[ALPHA])
    if (operation, scale) != ("add", 1.0):
        if keys == "added":
            raise VectorFileError(
                f"The file is made for op '{operation}' with scale {scale:g} ({MODE}, {ALPHA}); a vector that is only "
                f"added cannot say so. Import it with: {IMPORT}"
            )
        notes.insert(0, f"Made for op '{operation}' with scale {scale:g}.")
    extra = {key: str(value)[:_MAX_VALUE] for key, value in values.items() if key.startswith("glp.")}
    return Use(extra={key: value for key, value in extra.items() if key not in faults}, notes=" ".join(notes))


def glp_values(extra: Mapping[str, str]) -> dict[str, str | float | int]:
    """The `glp.*` keys to write for metadata that `use_of` made; empty for a vector that is to be added."""
    if MODE not in extra:
        return {}
    values: dict[str, str | float | int] = {key: value for key, value in extra.items() if key.startswith("glp.")}
    for key, kind in ((VERSION, int), (RANK, int), (ALPHA, float)):
        if key in values:
            try:
                values[key] = number = kind(values[key])
            except ValueError:
                number = -1
            if not 0 <= number < 2**32:  # the range of the file's type
                raise VectorFileError(f"The metadata's {key} is {shown(extra[key])}; a number from 0 is needed.")
    return values


def _faults(values: Mapping[str, Any], blocks: Collection[int]) -> dict[str, str]:
    """Key -> what is wrong, for the keys that change the meaning in a way that is not understood."""
    checks: dict[str, Callable[[Any], bool]] = {
        METADATA_KEY: lambda value: True,
        MODE: lambda value: value in ("add", PROJECT),
        HOOK: lambda value: value == OUR_HOOK,
        VERSION: lambda value: type(value) is int and value == 1,
        RANK: lambda value: type(value) is int and value == 1,
        ALPHA: lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0,
        LAYERS: lambda value: value == ",".join(map(str, sorted(blocks))),
    }
    faults = {}
    for key in sorted(values):
        known = checks.get(key)
        if known is None and _DESCRIPTION.fullmatch(key) is None:
            faults[key] = f"the key {shown(key)} is not known"
        elif known is not None and not known(values[key]):
            faults[key] = f"{key} = {shown(values[key])} is not supported"
    if MODE in values and 0 in blocks:
        faults["direction.0"] = f"direction.0 is not possible with {MODE}"
    return faults
