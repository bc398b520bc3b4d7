"""Changes of vectors and presets under load: each name has one owner, who knows what every answer must be."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx

from helpers.load_catalogue import push
from helpers.load_judging import Known, Tally, Verdict, is_promised_503, judged

NUM_VECTORS = NUM_PRESETS = 3


@dataclass(frozen=True, kw_only=True)
class Version:
    """One content of a name: the body of its PUT, and the answers to the same requests."""

    content: bytes
    answers: tuple[Known, ...]


@dataclass
class Name:
    """A vector or preset that changes. current: its version, None if it is deleted; only its owner writes it."""

    kind: str
    name: str
    versions: tuple[Version, ...]
    current: Version | None = None

    @property
    def path(self) -> str:
        return f"/v1/steering/{self.kind}s/{self.name}"

    @property
    def spec(self) -> dict[str, Any]:
        return {"preset": self.name} if self.kind == "preset" else {"edits": [{"vector": self.name}]}

    def request(self, number: int) -> Known:
        """Request `number` by this name. Its answer is that of any version: see `judge`."""
        known = self.versions[0].answers[number]
        body = {**known.body, "steering": self.spec}
        return Known(
            name=f"{self.kind} {self.name}", path=known.path, body=body, tokens=(), logprobs=(), plain=known.plain
        )


def registry_names(vector_answers: dict[int, tuple[Known, ...]]) -> list[Name]:
    """All names that change. vector_answers: axis of a version -> its known answers, in one order for all."""
    vectors: list[Version] = []
    presets: list[Version] = []
    for axis, answers in vector_answers.items():
        name = f"version-{'ab'[len(vectors)]}"
        edits = answers[0].body["steering"]["edits"]
        assert edits == [{"vector": name}]
        vectors.append(Version(content=push(axis), answers=answers))
        content = json.dumps({"edits": edits}).encode()
        presets.append(Version(content=content, answers=answers))
    return [
        *(Name("vector", f"load-{n}", tuple(vectors)) for n in range(NUM_VECTORS)),
        *(Name("preset", f"load-{n}", tuple(presets)) for n in range(NUM_PRESETS)),
    ]


def judge(
    name: Name, number: int, response: httpx.Response, allowed: tuple[Version | None, ...]
) -> tuple[Verdict, str]:
    """The verdict on request `number` by a name that had one of the `allowed` versions; None: deleted, so a 404."""
    if response.status_code == 404 and None in allowed:
        return Verdict.RIGHT, ""
    found: tuple[Verdict, str] = (Verdict.REFUSED, "404: the name is deleted")
    for version in allowed:
        if version is not None:
            found = judged(version.answers[number], response)
            if found[0] in (Verdict.RIGHT, Verdict.BUSY, Verdict.SERVER_ERROR):
                break
    if found[0] is Verdict.REFUSED and response.status_code == 200:
        return Verdict.WRONG, found[1]
    return found


class Owner:
    """Creates, replaces, requests and deletes one name, in a seeded order."""

    def __init__(
        self, client: httpx.AsyncClient, tally: Tally, name: Name, operator: dict[str, str], seed: str
    ) -> None:
        self._client, self._tally, self._name, self._operator = client, tally, name, operator
        self._rng = random.Random(seed)

    async def run(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            await self.step()
            await asyncio.sleep(self._rng.uniform(0.05, 0.3))
        await self.change(None)

    async def step(self) -> None:
        version = self._rng.choice((*self._name.versions, None))
        await self.change(version)
        await self.ask()

    async def change(self, version: Version | None) -> None:
        name, before = self._name, self._name.current
        if version is None:
            response = await self._client.delete(name.path, headers=self._operator)
            expected = 404 if before is None else 200
        else:
            headers = dict(self._operator)
            if before is not None and before is not version:
                refused = await self._client.put(name.path, content=version.content, headers=headers)
                self._judge_status(f"PUT {name.path} without If-Match", refused, 409)
                headers["If-Match"] = "*"
            response = await self._client.put(name.path, content=version.content, headers=headers)
            expected = 201 if before is None else 200
        if self._judge_status(f"{'PUT' if version else 'DELETE'} {name.path}", response, expected) is not Verdict.BUSY:
            name.current = version

    def _judge_status(self, request: str, response: httpx.Response, expected: int) -> Verdict:
        status = response.status_code
        if is_promised_503(response):  # too many uploads at once
            verdict = Verdict.BUSY
        elif status >= 500:
            verdict = Verdict.SERVER_ERROR
        else:
            verdict = Verdict.RIGHT if status == expected else Verdict.REFUSED
        self._tally.add("registry change", verdict, request, str(expected), f"{status} {response.text}")
        return verdict

    async def ask(self) -> None:
        """An acknowledged change holds for the next request."""
        await ask(self._client, self._tally, self._name, self._rng, "registry owner", (self._name.current,))


async def ask(
    client: httpx.AsyncClient,
    tally: Tally,
    name: Name,
    rng: random.Random,
    kind: str,
    allowed: tuple[Version | None, ...],
) -> None:
    number = rng.randrange(len(name.versions[0].answers))
    known = name.request(number)
    response = await client.post(known.path, json=known.body)
    verdict, expected = judge(name, number, response, allowed)
    got = f"{response.status_code} {response.text}"
    tally.add(kind, verdict, f"{known.name}: POST {known.path} {json.dumps(known.body)}", expected, got)
