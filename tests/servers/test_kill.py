"""The server's own routes, killed at 50 random moments of uploads, replaces and deletes: what it said is so."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from helpers.registry_app import ADMIN, KEY, MODEL, app_of

from steer_engine.api.routing import AdminKeys
from steer_engine.settings import ApiLimits
from steer_engine.vectors import ControlVector, Registry
from steer_engine.vectors.manifest import FOLDER, MANIFEST, read_manifest
from steer_engine.vectors.safetensors_format import to_bytes

MOMENTS, CLIENTS, NAMES = 50, 3, 3
WIDTH = 4096
PIECE = 20_000
"""A vector is sent in four pieces, so that most moments are in the middle of one."""

KINDS = ("upload", "replace", "delete")


class Client(threading.Thread):
    """Changes its own names, one change after the other, until the server is gone."""

    def __init__(self, url: str, number: int, state: dict[str, str], seed: int) -> None:
        super().__init__()
        self._url, self._rng, self.prefix = url, random.Random(seed), f"c{number}."
        self.state = {name: digest for name, digest in state.items() if name.startswith(self.prefix)}
        """Name -> digest, as acknowledged."""
        self.under_way: tuple[str, str, str | None] | None = None
        """Kind, name and wanted digest (None: deleted) of the change that has no answer."""
        self.done: list[str] = []
        self.wrong: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, headers=ADMIN, timeout=30) as client:
            try:
                while not self.wrong:
                    self._change(client)
            except httpx.TransportError:
                pass

    def _change(self, client: httpx.Client) -> None:
        name = f"{self.prefix}{self._rng.randrange(NAMES)}"
        known, url = self.state.get(name), f"/v1/steering/vectors/{name}"
        if known is not None and self._rng.random() < 0.4:
            self.under_way = "delete", name, None
            answer = client.delete(url)
            expected = 200
            self.state.pop(name)
        else:
            values = np.random.default_rng(self._rng.randrange(2**32)).standard_normal(4 * WIDTH).astype(np.float32)
            vector = ControlVector(directions=dict(enumerate(values.reshape(4, WIDTH))))
            self.under_way = "upload" if known is None else "replace", name, vector.digest
            headers = {} if known is None else {"If-Match": known}
            answer = client.put(url, content=_pieces(to_bytes(vector)), headers=headers)
            expected = 201 if known is None else 200
            self.state[name] = vector.digest
        if answer.status_code != expected:
            self.wrong.append(answer.text)
        self.done.append(self.under_way[0])
        self.under_way = None


def _pieces(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), PIECE):
        yield data[at : at + PIECE]
        time.sleep(0.001)


def serve(folder: Path, listener: socket.socket) -> int:
    """The server in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        model = dataclasses.replace(MODEL, hidden_size=WIDTH)
        app = app_of(Registry(folder), AdminKeys([KEY]), ApiLimits(), model)
        uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])
    finally:
        os._exit(1)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random(11)
    state: dict[str, str] = {}
    done: list[str] = []
    torn: list[str] = []
    for moment in range(MOMENTS):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            child = serve(tmp_path, listener)
        try:
            assert httpx.get(f"{url}/v1/steering/vectors", timeout=30).status_code == 200
            clients = [Client(url, number, state, seed=10 * moment + number) for number in range(CLIENTS)]
            time.sleep(rng.uniform(0.0, 0.25))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for client in clients:
            client.join()
        assert [client.wrong for client in clients] == [[]] * CLIENTS
        done += [kind for client in clients for kind in client.done]
        for left in (tmp_path / FOLDER).glob("incoming/*"):
            os.utime(left, (time.time() - 10, time.time() - 10))
        registry = Registry(tmp_path, strict=True)  # as the next start reads it
        found = registry.names()
        for client in clients:
            expected = dict(client.state)
            if client.under_way is not None:
                kind, name, wanted = client.under_way
                torn.append(kind)
                # The one change without an answer may have happened, or not; nothing in between.
                assert found.get(name) in (wanted, expected.pop(name, None))
                expected |= {name: found[name]} if name in found else {}
            assert {name: digest for name, digest in found.items() if name.startswith(client.prefix)} == expected
        for name, digest in found.items():
            assert registry.get(name).digest == digest
        state = found
        kept = {path.name for path in (tmp_path / FOLDER).glob("objects/*")}
        assert kept == read_manifest(tmp_path / FOLDER / MANIFEST)[0].object_names
        assert {f"sha256:{name[:64]}" for name in kept} == set(found.values())
        assert not list((tmp_path / FOLDER).glob("incoming/*"))
    assert {kind: done.count(kind) for kind in KINDS if kind not in done} == {}
    assert len(torn) > MOMENTS // 2
    assert set(torn) >= {"upload", "replace"}
