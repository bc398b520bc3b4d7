"""Looking up the vectors that a request names, and checking them against the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

from steer_engine.errors import SteerError, SteeringRequestError, UnknownVectorError
from steer_engine.fields import shown
from steer_engine.model_shape import ModelShape, describe_blocks
from steer_engine.site import Site, describe_sites
from steer_engine.vectors import ControlVector, RowSet
from steer_engine.vectors.files import as_directions

VectorSource = Callable[[str], ControlVector | RowSet]
"""Name or `sha256:...` digest -> vector or row set. Raises UnknownVectorError."""
Keep = Callable[[ControlVector], ControlVector]
"""Notes that the request needs a vector, and returns it."""

Value = TypeVar("Value")

MAX_REPEATED = 128
"""Values that are kept. Their vectors are in memory anyway, unless they were deleted or replaced meanwhile."""


def lookup(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    file = lookup_file(name, param, vectors, model)
    try:
        return as_directions(file, name)
    except SteeringRequestError as error:
        raise SteeringRequestError(error.message, param) from None


def lookup_file(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector | RowSet:
    try:
        vector = vectors(name)
    except UnknownVectorError as error:
        raise UnknownVectorError(error.message, param) from None
    if vector.hidden_size != model.hidden_size:
        raise SteeringRequestError(
            f"Vector {shown(name)} has hidden size {vector.hidden_size}, the model has "
            f"{model.hidden_size}: it was made for another model.",
            param,
        )
    return vector


def check_blocks(blocks: tuple[int, ...], vector: ControlVector | RowSet, param: str, model: ModelShape) -> None:
    if blocks[-1] >= model.num_blocks:
        raise SteeringRequestError(
            f"Block {blocks[-1]} does not exist: the model has blocks 0 to {model.num_blocks - 1}.", param
        )
    wanted = frozenset(blocks)
    if unarmed := tuple(sorted(wanted - model.armed)):
        raise SteeringRequestError(
            f"Blocks {describe_blocks(unarmed)} are not armed here; armed: {describe_blocks(model.armed_blocks)} "
            "(--steering-blocks).",
            param,
        )
    if absent := tuple(sorted(wanted - set(vector.blocks))):
        raise SteeringRequestError(
            f"The vector has no direction at blocks {describe_blocks(absent)}; it has "
            f"{describe_blocks(vector.blocks)}.",
            param,
        )


def site_for(requested: Site | None, vector: ControlVector | RowSet, param: str, model: ModelShape) -> Site:
    """The requested site, or else the one that the vector was derived at.

    Raises:
        SteeringRequestError: it is not armed.
    """
    own = vector.metadata.site
    if requested is None and own is not Site.BLOCK and own not in model.sites:
        raise SteeringRequestError(
            f"The vector was derived at site {own.value!r}, which is not armed here; armed: "
            f"{describe_sites(model.sites)} (--steering-sites). Arm it, or name one of these to use it there.",
            param,
        )
    site = own if requested is None else requested
    check_site(site, param, model)
    return site


def check_site(site: Site, param: str, model: ModelShape) -> None:
    if site is Site.BLOCK or site in model.sites:
        return
    raise SteeringRequestError(
        f"Site {site.value!r} is not armed here; armed: {describe_sites(model.sites)} (--steering-sites).", param
    )


def check_direction(vector: ControlVector, blocks: tuple[int, ...], param: str) -> None:
    flat = tuple(block for block in blocks if vector.norms[block] == 0.0)
    if flat:
        raise SteeringRequestError(
            f"The vector is zero at blocks {describe_blocks(flat)}: it has no direction there.", param
        )


class Repeated(Generic[Value]):
    """What was made lately of vectors and something else, its key.

    What comes again costs a comparison. A value is used again while every name that it was made from stands for the
    same object as before: after a vector was replaced, even by one of equal content, it is made anew.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[dict[str, ControlVector | RowSet], Value]] = {}

    def get(self, key: Hashable, vectors: VectorSource, make: Callable[[VectorSource], Value]) -> Value:
        """The value of `key`, or what `make` returns for a source of vectors."""
        kept = self._kept.get(key)
        if kept is not None and _unchanged(kept[0], vectors):
            return kept[1]
        used: dict[str, ControlVector | RowSet] = {}

        def source(name: str) -> ControlVector | RowSet:
            used[name] = vectors(name)
            return used[name]

        value = make(source)
        if len(self._kept) >= MAX_REPEATED:
            self._kept.clear()
        self._kept[key] = used, value
        return value


def _unchanged(used: Mapping[str, ControlVector | RowSet], vectors: VectorSource) -> bool:
    try:
        return all(vectors(name) is vector for name, vector in used.items())
    except SteerError:
        return False  # making it anew says which field names what is gone
