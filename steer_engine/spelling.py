"""How close two names are: for messages that say which name was probably meant."""

from __future__ import annotations

from collections.abc import Iterable

MAX_COMPARED = 256
"""Names that `closest` looks at. A misspelled name is a cheap mistake, whatever the number of valid names."""


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b` (optimal string alignment).

    Takes len(a) * len(b) steps: bound the lengths first where a client chooses them.
    """
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        current = [i]
        for j, other in enumerate(b, start=1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]


def closest(name: str, names: Iterable[str], count: int) -> list[str]:
    """At most `count` of `names`, the most similar to `name` first; only the first MAX_COMPARED are looked at."""
    wanted = _features(name)

    def unlike(other: str) -> tuple[float, str]:
        features = _features(other)
        return -2 * len(wanted & features) / (len(wanted) + len(features)), other

    compared = [other for _, other in zip(range(MAX_COMPARED), names, strict=False)]
    return sorted(compared, key=unlike)[:count]


def _features(name: str) -> set[str]:
    """Letters, pairs of letters, and the first letter: what survives a typo, compared at the speed of sets."""
    lower = f"^{name.casefold()}"
    return {*lower, *(lower[i : i + 2] for i in range(len(lower) - 1))}
