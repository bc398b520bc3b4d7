"""Sends the requests, several at a time, and keeps the verdicts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

import httpx

from fuzzing.corpus import Sent
from fuzzing.sequence import request
from fuzzing.sockets import exchange, raw_request, raw_verdict, statuses_of
from fuzzing.verdicts import verdict

RAW_GROUP = "raw sockets"


@dataclass(frozen=True)
class Finding:
    """number: of the request in its sequence. what: what is wrong. shown: beginning of request and answer."""

    group: str
    number: int
    what: str
    shown: str
    sent: Sent | None = None


@dataclass
class Result:
    """classes: group -> class of the answers' statuses -> how many. mutations: kind -> how many requests had it."""

    classes: dict[str, Counter[str]] = field(default_factory=dict)
    mutations: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, group: str, kind: str) -> None:
        self.classes.setdefault(group, Counter())[kind] += 1


@dataclass(frozen=True)
class One:
    """What became of one request: the class of its status, and a finding if something is wrong."""

    group: str
    kind: str
    mutations: tuple[str, ...]
    finding: Finding | None = None


def class_of(status: int) -> str:
    return str(status) if status >= 500 else f"{status // 100}xx"


@dataclass(frozen=True)
class Sender:
    """Sends requests to one server. timeout: seconds after which an answer counts as a hang."""

    client: httpx.Client
    key: str
    admin_key: str
    timeout: float

    def answer(self, sent: Sent) -> httpx.Response:
        """The path is sent as it is written. An unused connection that the server has just closed is no finding."""
        url = self.client.base_url.copy_with(raw_path=sent.path.encode("ascii", "replace"))
        headers = {"authorization": f"Bearer {self.admin_key if sent.admin else self.key}", **sent.headers}
        prepared = self.client.build_request(sent.method, url, content=sent.content, headers=headers)
        prepared.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)
        try:
            return self.client.send(prepared)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            return self.client.send(prepared)

    def body(self, seed: int, number: int) -> One:
        sent = request(seed, number)
        try:
            answer = self.answer(sent)
        except httpx.TimeoutException:
            return self._failed(sent, number, "hang", f"no answer in {self.timeout:g} s")
        except httpx.TransportError as error:
            return self._failed(sent, number, "no answer", f"{type(error).__name__}: {error}")
        found = verdict(sent, answer.status_code, answer.headers, answer.text)
        one = One(sent.group, class_of(answer.status_code), sent.mutations)
        return one if found is None else _with(one, sent, number, found, answer.text)

    def raw(self, seed: int, number: int) -> One:
        raw = raw_request(seed, number)
        url = self.client.base_url
        try:
            received, ended = exchange((url.host, url.port or 80), raw, self.timeout)
        except OSError as error:
            finding = Finding(RAW_GROUP, number, f"no connection: {error}", raw.kind)
            return One(RAW_GROUP, "no answer", (raw.kind,), finding)
        statuses = statuses_of(received)
        kind = class_of(max(statuses)) if statuses else ("closed" if ended else "left waiting")
        found = raw_verdict(raw, received, ended)
        shown = f"{raw.kind}: {raw.pieces[0][:300]!r} -> {received[-500:]!r}"
        return One(RAW_GROUP, kind, (raw.kind,), Finding(RAW_GROUP, number, found, shown) if found else None)

    def _failed(self, sent: Sent, number: int, kind: str, why: str) -> One:
        return _with(One(sent.group, kind, sent.mutations), sent, number, f"{kind}: {why}", "")


def _with(one: One, sent: Sent, number: int, what: str, text: str) -> One:
    shown = f"{sent.method} {sent.path[:200]} {dict(sent.headers)!s:.200} {sent.content[:600]!r} -> {text[:600]}"
    return One(one.group, one.kind, one.mutations, Finding(one.group, number, what, shown, sent))


def send_all(one: Callable[[int], One], numbers: Iterable[int], at_once: int, result: Result) -> Iterator[None]:
    """Call `one` with every number, `at_once` at a time, and add what it returns to `result`. Yields after each."""
    begun = time.monotonic()
    left = iter(numbers)
    with ThreadPoolExecutor(at_once) as pool:
        running: set[Future[One]] = {pool.submit(one, number) for number in islice(left, at_once)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                got = future.result()
                result.count(got.group, got.kind)
                result.mutations.update(set(got.mutations) or {"none"})
                if got.finding is not None:
                    result.findings.append(got.finding)
                yield
            running |= {pool.submit(one, number) for number in islice(left, len(done))}
    result.seconds += time.monotonic() - begun
