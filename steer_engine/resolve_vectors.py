"""Looking up the vectors that a request names, and checking them against the model."""

from __future__ import annotations

from collections.abc import Callable

from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.fields import shown
from steer_engine.model_shape import ModelShape, describe_blocks
from steer_engine.site import Site, describe_sites
from steer_engine.vectors import ControlVector, RowSet
from steer_engine.vectors.files import as_directions

VectorSource = Callable[[str], ControlVector | RowSet]
"""Name or `sha256:...` digest -> vector or row set. Raises UnknownVectorError."""
Keep = Callable[[ControlVector], ControlVector]
"""Notes that the request needs a vector, and returns it."""


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
