"""Drafts by n-gram lookup; run by `test_modes.py` in a process of its own."""

from __future__ import annotations

import pytest
from helpers.captured_answers import assert_rows, capture
from helpers.driving import tokens
from helpers.oracle import Oracle
from helpers.traffic import SPECS, Ask, Start, assert_right, drafts_of

from steer_engine import LLM

PHRASE = tokens(31, 9)
REQUESTED = [Ask([*tokens(600 + i, i), *PHRASE * 4], spec, 24) for i, spec in enumerate(SPECS * 2)]
"""Prompts that repeat themselves, so that their continuation is guessed, several rows a request and step."""


@pytest.fixture(scope="module")
def llm(start: Start) -> LLM:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    return start(capture=True, speculative_config=drafts, max_num_seqs=16)


def test_ngram_drafts(llm: LLM, oracle: Oracle) -> None:
    outputs, accepted = drafts_of(llm, REQUESTED)
    assert_right(oracle, REQUESTED, outputs)
    assert accepted > 0


def test_captured_answers(llm: LLM, oracle: Oracle) -> None:
    outputs, accepted = drafts_of(llm, REQUESTED, capture)
    assert_rows(oracle, REQUESTED, outputs)
    assert accepted > 0
