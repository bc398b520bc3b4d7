"""Some hundred requests of the fuzz of routes against a real server. The whole fuzz is a script of its own."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz_routes import fuzz, split_by_plain_vllm
from fuzzing.sending import Sender
from fuzzing.target import check_references, clean_up, differences, left_behind, own_server, processes, references
from helpers.living import ADMIN, INFERENCE
from rich.console import Console

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEED, BODIES, RAW = 20, 600, 60


def test_damaged_requests_are_answered_properly() -> None:
    with own_server() as server:
        sender = Sender(server.client, INFERENCE, ADMIN, 60.0)
        before, alive = references(sender), processes(server.process.pid)
        check_references(before)
        result = fuzz(sender, SEED, BODIES, RAW, 8, Console(quiet=True))
        result.findings += differences(before, references(sender))
        clean_up(sender)
        assert processes(server.process.pid) == alive
        result.findings += left_behind(server)
    ours, _ = split_by_plain_vllm(result.findings)
    assert ours == []
    classes = sum(result.classes.values(), Counter())
    assert classes.total() == BODIES + RAW
    assert classes["2xx"] > 50
    assert classes["4xx"] > 300
