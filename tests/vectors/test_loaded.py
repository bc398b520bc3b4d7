"""Contents kept in memory: never more than the budget, and the least recently used goes first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from steer_engine.vectors.cache import VectorCache


def test_the_least_recently_used_goes_first() -> None:
    loaded: VectorCache[str] = VectorCache(budget=30)
    for digest in "abc":
        loaded.put(digest, digest.upper(), 10)
    assert loaded.get("a") == "A"
    loaded.put("d", "D", 10)
    assert loaded.get("b") is None
    assert loaded.digests() == ["c", "a", "d"]


def test_one_is_kept_whatever_its_size() -> None:
    loaded: VectorCache[str] = VectorCache(budget=30)
    loaded.put("small", "S", 10)
    loaded.put("large", "L", 100)
    assert loaded.digests() == ["large"]
    loaded.put("small", "S", 10)
    assert loaded.digests() == ["small"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60))
def test_bytes_are_those_of_what_is_kept(puts: list[tuple[int, int]]) -> None:
    loaded: VectorCache[int] = VectorCache(budget=100)
    for number, num_bytes in puts:
        loaded.put(str(number), num_bytes, num_bytes)
        kept = [loaded.get(digest) for digest in loaded.digests()]
        assert loaded.num_bytes == sum(each or 0 for each in kept) <= 100
