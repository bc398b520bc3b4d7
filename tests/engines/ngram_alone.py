"""Drafts by n-gram lookup; run by `test_modes.py` in a process of its own."""

from __future__ import annotations

from helpers.driving import tokens
from helpers.oracle import Oracle
from helpers.traffic import SPECS, Ask, Start, assert_right, drafts_of


def test_ngram_drafts(start: Start, oracle: Oracle) -> None:
    """Prompts that repeat themselves, so that their continuation is guessed, several rows a request and step."""
    llm = start(
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
        max_num_seqs=16,
    )
    phrase = tokens(31, 9)
    requested = [Ask([*tokens(600 + i, i), *phrase * 4], spec, 24) for i, spec in enumerate(SPECS * 2)]
    outputs, accepted = drafts_of(llm, requested)
    assert_right(oracle, requested, outputs)
    assert accepted > 0
