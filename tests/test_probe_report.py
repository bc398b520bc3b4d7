"""The numbers of probes in an answer: aligned, in parts, and summed up."""

from __future__ import annotations

import numpy as np

from steer_engine.edit import GENERATION
from steer_engine.probe import Platt, Probe
from steer_engine.probe_report import ProbeAnswer


def probe(name: str, blocks: tuple[int, ...] = (3,), returns: str = "tokens", platt: tuple[Platt, ...] = ()) -> Probe:
    return Probe(name, "sha256:0", blocks, "dot", GENERATION, False, returns, platt)


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_numbers_come_in_parts_by_name_and_block() -> None:
    answer = ProbeAnswer([probe("a", (3, 5)), probe("b")])
    answer.put(rows([1.0, 2.0, 3.0]), rows([7.0, np.nan, 9.0]))
    assert answer.take() == {
        "prompt_probes": {"a": {"3": [7.0], "5": [None]}, "b": {"3": [9.0]}},
        "probes": {"a": {"3": [1.0], "5": [2.0]}, "b": {"3": [3.0]}},
    }
    assert answer.take() == {}
    answer.put(rows([4.0, 5.0, 6.0], [1.5, 2.5, 0.25]))
    assert answer.take() == {"probes": {"a": {"3": [4.0, 1.5], "5": [5.0, 2.5]}, "b": {"3": [6.0, 0.25]}}}


def test_nine_digits_are_enough_for_any_number() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e-3)
    answer = ProbeAnswer([probe("a")])
    answer.put(values[:, None])
    told = np.array(answer.take()["probes"]["a"]["3"], dtype=np.float32)
    assert (told == values).all()


def test_a_summary_comes_when_the_answer_is_finished_and_covers_the_prompt() -> None:
    answer = ProbeAnswer([probe("s", returns="summary"), probe("n", returns="none")])
    answer.put(rows([2.0, 0.0]), rows([6.0, 0.0], [np.nan, 0.0]))
    answer.put(rows([1.0, 0.0], [np.inf, 0.0]))
    assert answer.take() == {}
    answer.finished = True
    assert answer.take() == {"probes": {"s": {"3": {"mean": 3.0, "max": 6.0, "tokens": 3}}}}


def test_a_summary_of_nothing() -> None:
    answer = ProbeAnswer([probe("s", returns="summary")])
    answer.finished = True
    assert answer.take()["probes"]["s"]["3"] == {"mean": None, "max": None, "tokens": 0}


def test_a_probability_replaces_the_dot_product_at_its_block() -> None:
    answer = ProbeAnswer([probe("a", (3, 5), platt=(Platt(1.0, 0.0), Platt(-2.0, 1.0))), probe("b")])
    answer.put(rows([0.0, 0.5, 4.0], [np.nan, 100.0, 4.0]))
    told = answer.take()["probes"]
    assert told == {"a": {"3": [0.5, None], "5": [0.5, told["a"]["5"][1]]}, "b": {"3": [4.0, 4.0]}}
    assert 0 <= told["a"]["5"][1] < 1e-80


def test_tokens_without_a_row_have_no_number() -> None:
    answer = ProbeAnswer([probe("a")])
    answer.put(rows([1.0]))
    answer.pad(3)
    answer.pad(3)
    assert answer.take() == {"probes": {"a": {"3": [1.0, None, None]}}}
