"""Judges the answers of a load test by the answers that the same server gave alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

LOGPROB_BOUND = 1e-4
"""Of a float32 logprob of the tiny model against itself in another batch: the bound of helpers.traffic."""
MAX_MESSAGES = 20
"""Faults that are described; all are counted."""


class Verdict(StrEnum):
    RIGHT = "right"
    BUSY = "busy"
    """A promised 503: of a steered request, with Retry-After."""
    WRONG = "wrong"
    UNSTEERED = "unsteered"
    SERVER_ERROR = "5xx"
    REFUSED = "refused"
    """Another status than the expected one, or no answer."""


FAULTS = (Verdict.WRONG, Verdict.UNSTEERED, Verdict.SERVER_ERROR, Verdict.REFUSED)


@dataclass(frozen=True, kw_only=True)
class Known:
    """A request and the answer that it gets alone.

    name: for messages. tokens: of each of its `n` choices. logprobs: of these tokens. plain: the tokens of the same
    prompt without steering. digest: of its steering; None for a plain request.
    """

    name: str
    path: str
    body: dict[str, Any]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    plain: tuple[int, ...]
    digest: str | None = None

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client reads in an answer with status 200. tokens and logprobs: by choice; no logprobs: empty."""

    tokens: dict[int, list[int]]
    logprobs: dict[int, list[float]]
    steering: dict[str, Any] | None

    @classmethod
    def read(cls, response: httpx.Response, *, stream: bool) -> Answer:
        """Raises ValueError: not JSON, a stream without its end, or one with an error event."""
        return cls.joined(events_of(response.text) if stream else [response.json()])

    @classmethod
    def beginning(cls, lines: list[str]) -> Answer:
        """Of the first lines of a stream. Raises ValueError: not JSON, or an error event."""
        found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return cls.joined([json.loads(event) for event in found if event != "[DONE]"])

    @classmethod
    def joined(cls, parts: list[dict[str, Any]]) -> Answer:
        tokens: dict[int, list[int]] = {}
        logprobs: dict[int, list[float]] = {}
        steering = None
        for part in parts:
            if "error" in part:
                raise ValueError(f"error event {part['error']}")
            steering = part.get("steering") or steering
            for choice in part["choices"]:
                tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
                logprobs.setdefault(choice["index"], []).extend(_logprobs(choice.get("logprobs")))
        return cls(tokens=tokens, logprobs=logprobs, steering=steering)


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events. Raises ValueError if the stream does not end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        raise ValueError("the stream does not end with [DONE]")
    return [json.loads(line) for line in lines[:-1]]


def _logprobs(found: dict[str, Any] | None) -> list[float]:
    if found is None:
        return []
    if "token_logprobs" in found:
        return list(found["token_logprobs"])
    return [token["logprob"] for token in found.get("content") or []]


def judged(known: Known, response: httpx.Response) -> tuple[Verdict, str]:
    """The verdict on a whole answer, and what was expected instead if it is a fault."""
    status = response.status_code
    if is_promised_503(response) and known.digest is not None:
        return Verdict.BUSY, ""
    if status >= 500:
        return Verdict.SERVER_ERROR, "200, or 503 with Retry-After if the request is steered"
    if status != 200:
        return Verdict.REFUSED, "200"
    try:
        answer = Answer.read(response, stream=known.stream)
    except ValueError as error:
        return Verdict.SERVER_ERROR if "error event" in str(error) else Verdict.WRONG, f"a whole answer: {error}"
    return judged_content(known, answer, response.headers.get("X-Steering"))


def judged_content(known: Known, answer: Answer, header: str | None) -> tuple[Verdict, str]:
    """The verdict on what a client reads. header: `X-Steering`."""
    found = None if answer.steering is None else answer.steering.get("digest")
    if (header, found) != (known.digest, known.digest):
        missing = known.digest is not None and (header is None or found is None)
        verdict = Verdict.UNSTEERED if missing else Verdict.WRONG
        return verdict, f"steering {known.digest}, not header {header} and body {found}"
    expected = list(known.tokens)
    wanted = int(known.body.get("n", 1))
    if sorted(answer.tokens) != list(range(wanted)):
        return Verdict.WRONG, f"{wanted} choices, not {sorted(answer.tokens)}"
    for number, tokens in answer.tokens.items():
        if tokens != expected:
            unsteered = known.digest is not None and tokens == list(known.plain)
            return Verdict.UNSTEERED if unsteered else Verdict.WRONG, f"tokens {expected}, not {tokens}"
        logprobs = answer.logprobs[number]
        if known.body.get("logprobs") is None:
            continue
        if len(logprobs) != len(expected):
            return Verdict.WRONG, f"{len(expected)} logprobs, not {len(logprobs)}"
        # `not <=`: NaN is a fault too.
        if not all(abs(mine - theirs) <= LOGPROB_BOUND for mine, theirs in zip(logprobs, known.logprobs, strict=True)):
            return Verdict.WRONG, f"logprobs {known.logprobs} within {LOGPROB_BOUND}, not {logprobs}"
    return Verdict.RIGHT, ""


def judged_beginning(known: Known, answer: Answer, header: str | None) -> tuple[Verdict, str]:
    """The verdict on an answer that is longer than the known one, or that its client left. header: `X-Steering`."""
    if header != known.digest:
        verdict = Verdict.UNSTEERED if header is None else Verdict.WRONG
        return verdict, f"steering {known.digest}, not header {header}"
    for tokens in answer.tokens.values():
        length = min(len(tokens), len(known.tokens))
        if tokens[:length] != list(known.tokens[:length]):
            return Verdict.WRONG, f"a beginning of {list(known.tokens)}, not {tokens}"
    return Verdict.RIGHT, ""


def is_promised_503(response: httpx.Response) -> bool:
    """No room now: a 503 that says when to come back, in the usual format."""
    if response.status_code != 503 or not response.headers.get("Retry-After", "").isdigit():
        return False
    return int(response.headers["Retry-After"]) >= 1 and bool(response.json()["error"]["message"])


@dataclass
class Tally:
    """Counts verdicts by kind of traffic, and describes the first faults."""

    counts: dict[str, Counter[Verdict]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, kind: str, verdict: Verdict, request: str = "", expected: str = "", got: str = "") -> None:
        """request: the request itself, for the message about a fault."""
        self.counts.setdefault(kind, Counter())[verdict] += 1
        if verdict in FAULTS and len(self.messages) < MAX_MESSAGES:
            self.messages.append(f"{verdict}: {kind}: {request[:2000]}\n  expected {expected}\n  answer: {got[:600]}")

    def add_answer(self, kind: str, known: Known, response: httpx.Response) -> Verdict:
        verdict, expected = judged(known, response)
        got = f"{response.status_code} {response.text}"
        self.add(kind, verdict, f"{known.name}: POST {known.path} {json.dumps(known.body)}", expected, got)
        return verdict

    def total(self, verdict: Verdict) -> int:
        return sum(counts[verdict] for counts in self.counts.values())

    @property
    def num_faults(self) -> int:
        return sum(self.total(verdict) for verdict in FAULTS)

    def table(self) -> str:
        """One line per kind."""
        lines = []
        for kind, counts in sorted(self.counts.items()):
            numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
            lines.append(f"{kind:24} {counts.total():7}  {numbers}")
        return "\n".join(lines)
