"""Sites: the places in a block where x is edited, measured and captured; and points, which number those of all blocks.

The site "block" is the block's output: the residual stream after the block. The others are the outputs of its attention
and of its MLP, before they are added to the stream.

A point is one block at one site, as a number. At the site "block" it is the number of the block. So programs, bank
rows, device tables and digests, which are made for block numbers, hold points without a further field.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from steer_engine.fields import MAX_BLOCK_NUMBER


class Site(StrEnum):
    """Where in a block x is edited, measured or captured."""

    BLOCK = "block"
    """The residual stream after the block."""
    ATTN = "attn"
    """The output of the attention, before it is added to the stream."""
    MLP = "mlp"
    """The output of the MLP, before it is added to the stream."""


SITES_IN_BLOCKS = (Site.ATTN, Site.MLP)
"""The sites that an engine arms only on request."""

_ALL = tuple(Site)
_POINTS_PER_SITE = MAX_BLOCK_NUMBER + 1


def points_at(blocks: Iterable[int], site: Site) -> tuple[int, ...]:
    """The points of `blocks` at one site, in the order of the blocks."""
    first = _ALL.index(site) * _POINTS_PER_SITE
    return tuple(first + block for block in blocks) if first else tuple(blocks)


def all_points(blocks: Iterable[int], sites: Iterable[Site]) -> tuple[int, ...]:
    """The points of ascending `blocks` at their outputs and at `sites`, ascending."""
    blocks = tuple(blocks)
    return tuple(point for site in _ALL if site is Site.BLOCK or site in sites for point in points_at(blocks, site))


def describe_sites(sites: Iterable[Site]) -> str:
    """The sites that are armed, for a message: "block, mlp"."""
    return ", ".join((Site.BLOCK, *sites))


def block_of(point: int) -> int:
    return point % _POINTS_PER_SITE


def site_of(point: int) -> Site:
    return _ALL[point // _POINTS_PER_SITE]


def describe_point(point: int) -> str:
    """For a message: "3" for the output of block 3, "3 (mlp)" for another site."""
    site = site_of(point)
    return str(point) if site is Site.BLOCK else f"{block_of(point)} ({site})"
