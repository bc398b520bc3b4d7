"""The clients of a load test: what they send, how they hang up, and how many there are."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import httpx

from helpers.attack import quiet
from helpers.hostile_bodies import HostileBodies
from helpers.load_catalogue import push
from helpers.load_judging import Answer, Known, Tally, Verdict, is_promised_503, judged_beginning
from helpers.load_registry import Name, Owner, ask

NUM_CLIENTS = 10
BURST_SECONDS = 10.0
"""Between two bursts, which fill the queue for bank rows."""
WRITTEN = 200
"""Tokens of an answer whose client hangs up."""


class Traffic:
    """Seeded clients on one server, until `run` has lasted its seconds.

    catalogue, bursts: requests with known answers, sent one by one, and all together. names: what its owners change.
    """

    def __init__(
        self,
        url: str,
        tally: Tally,
        *,
        catalogue: Sequence[Known],
        bursts: Sequence[Known],
        names: Sequence[Name],
        operator: dict[str, str],
        seed: int,
    ) -> None:
        self._url, self._tally, self._operator, self._seed = url, tally, operator, seed
        self._catalogue, self._bursts, self._names = catalogue, bursts, names
        self._hostile = HostileBodies(random.Random(f"{seed} hostile"), push(1), operator)
        self._ended = asyncio.Event()

    async def run(self, seconds: float) -> None:
        # uvicorn closes a connection that is idle for 5 s, which is httpx's default too: let the client be first.
        limits = httpx.Limits(max_connections=200, keepalive_expiry=2)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client,
            asyncio.TaskGroup() as clients,
        ):
            for number in range(NUM_CLIENTS):
                clients.create_task(self._client(client, random.Random(f"{self._seed} {number}")))
            for name in self._names:
                seed = f"{self._seed} {name.path}"
                clients.create_task(Owner(client, self._tally, name, self._operator, seed).run(self._ended))
            clients.create_task(self._burst_now_and_then(client))
            await asyncio.sleep(seconds)
            self._ended.set()

    async def _client(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        kinds: dict[Callable[[httpx.AsyncClient, random.Random], Awaitable[None]], int] = {
            self._known: 10,
            self._hang_up_in_a_stream: 2,
            self._hang_up_before_the_answer: 2,
            self._changing_name: 3,
            self._hostile_body: 3,
        }
        while not self._ended.is_set():
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            try:
                await kind(client, rng)
            except (httpx.TransportError, OSError, IndexError) as error:
                self._tally.add(kind.__name__.strip("_"), Verdict.REFUSED, "see kind", "an answer", repr(error))

    async def _known(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        known = rng.choice(self._catalogue)
        response = await client.post(known.path, json=known.body)
        self._tally.add_answer("plain" if known.digest is None else "steered", known, response)

    async def _hang_up_in_a_stream(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """Reads some events of a long answer and closes the connection."""
        known = rng.choice([each for each in self._catalogue if each.stream])
        long = replace(known, body={**known.body, "max_tokens": WRITTEN})
        num_lines = rng.randrange(1, 40)
        received: list[str] = []
        async with client.stream("POST", long.path, json=long.body) as response:
            if response.status_code != 200:
                await response.aread()
                self._tally.add_answer("abort in a stream", long, response)
                return
            async for line in response.aiter_lines():
                received.append(line)
                if len(received) >= num_lines:
                    break
        self._judge_beginning("abort in a stream", long, response, lambda: Answer.beginning(received))

    async def _hang_up_before_the_answer(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """Closes the connection while the server reads, admits, waits for rows, or generates."""
        known = rng.choice(self._catalogue)
        long = replace(known, body={**known.body, "max_tokens": WRITTEN, "stream": False})
        response = await answer_within(rng.choice((0.002, 0.02, 0.1, 0.5)), client.base_url, long)
        if response is None:
            self._tally.add("abort of a whole answer", Verdict.RIGHT)
        elif response.status_code != 200:
            self._tally.add_answer("abort of a whole answer", long, response)
        else:
            read = partial(Answer.read, response, stream=False)
            self._judge_beginning("abort of a whole answer", long, response, read)

    def _judge_beginning(self, kind: str, known: Known, response: httpx.Response, read: Callable[[], Answer]) -> None:
        request = f"{known.name}: POST {known.path} {json.dumps(known.body)}"
        try:
            answer = read()
        except ValueError as error:
            self._tally.add(kind, Verdict.SERVER_ERROR, request, "an answer without an error", str(error))
            return
        verdict, expected = judged_beginning(known, answer, response.headers.get("X-Steering"))
        self._tally.add(kind, verdict, request, expected, str(answer))

    async def _changing_name(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        name = rng.choice(self._names)
        await ask(client, self._tally, name, rng, "changing name", (*name.versions, None))

    async def _hostile_body(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        hostile = self._hostile.next()
        response = await client.request(hostile.method, hostile.path, content=hostile.content, headers=hostile.headers)
        verdict, expected = Verdict.RIGHT, ""
        if is_promised_503(response):
            verdict = Verdict.BUSY
        elif response.status_code >= 500:
            verdict, expected = Verdict.SERVER_ERROR, "a 4xx"
        elif response.status_code < 400:
            verdict, expected = Verdict.WRONG, "a 4xx"
        else:
            try:
                quiet(response.text, hostile.content)
            except AssertionError as error:
                verdict, expected = Verdict.WRONG, f"an error that shows nothing of the server: {error}"
        self._tally.add("hostile body", verdict, str(hostile), expected, f"{response.status_code} {response.text}")

    async def _burst_now_and_then(self, client: httpx.AsyncClient) -> None:
        while not self._ended.is_set():
            async with asyncio.TaskGroup() as burst:
                for known in self._bursts:
                    burst.create_task(self._one_of_a_burst(client, known))
            try:
                async with asyncio.timeout(BURST_SECONDS):
                    await self._ended.wait()
            except TimeoutError:
                continue

    async def _one_of_a_burst(self, client: httpx.AsyncClient, known: Known) -> None:
        response = await client.post(known.path, json=known.body)
        self._tally.add_answer("burst of inline vectors", known, response)


async def answer_within(seconds: float, url: httpx.URL, known: Known) -> httpx.Response | None:
    """The answer to a request that is sent as a whole; None if the connection was closed before it came.

    On a socket of its own: an httpx request that is cancelled while it connects leaves its socket open.
    """
    content = json.dumps(known.body).encode()
    head = f"POST {known.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        async with asyncio.timeout(seconds):
            received = await reader.read()
    except TimeoutError:
        return None
    finally:
        writer.close()
        with suppress(OSError):  # the server may have reset it
            await writer.wait_closed()
    lines, _, body = received.partition(b"\r\n\r\n")
    status, *headers = lines.decode("latin-1").split("\r\n")
    pairs = [(name, value.strip()) for name, _, value in (line.partition(":") for line in headers)]
    return httpx.Response(int(status.split()[1]), headers=pairs, content=body)
