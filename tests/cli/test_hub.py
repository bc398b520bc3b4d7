"""`vectors pull` and `push` with `hf://`: a small hub on this machine answers the hub's own client over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch

from steer_engine.vectors import ControlVector, load, save

TOKEN = "hf_a_token_that_may_write"
COMMIT = "a" * 40
SAID = "said to be large"
"""Content of a file that the hub says is larger than any vector."""

Files = dict[str, bytes]


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that listing, downloading and uploading need. Uploads are in the commit."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, Files]
    private: set[str]
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, revision = unquote(urlsplit(self.path).path).lstrip("/").partition("/revision/")
        self.requests.append(f"{self.command} {self.path}")
        if path.startswith("api/models/"):
            repository, file = path.removeprefix("api/models/"), None
        else:
            repository, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
        if (files := self.readable(repository)) is None:
            self.answer(401, {"error": "Invalid username or password."}, code="RepoNotFound")
        elif repository == "org/gated":
            self.answer(403, {"error": "Access to it is restricted."}, code="GatedRepo")
        elif repository == "org/broken":
            self.answer(500, {"error": "The hub has a bad day."})
        elif repository == "org/silent":
            self.answer(500, {})
        elif revision not in ("", "main", "v1", COMMIT):
            self.answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        elif file is None:
            size = {name: 1 << 40 if content == SAID.encode() else len(content) for name, content in files.items()}
            siblings = [{"rfilename": name, "size": size[name], "blobId": "b"} for name in files]
            self.answer(200, {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        elif file not in files:
            self.answer(404, {"error": "Entry not found"}, code="EntryNotFound")
        else:
            self.answer(200, files[file])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(403, {"error": "Forbidden: pass a token with write access."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            is_new = name not in self.repositories
            self.repositories.setdefault(name, {})
            if is_new and (asked.get("visibility") == "private" or asked.get("private")):  # of newer or older clients
                self.private.add(name)
            url = f"http://{self.headers['Host']}/{name}"
            self.answer(200 if is_new else 409, {"url": url, "id": name, "name": name})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            plain = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            self.answer(200, {"files": plain})
        elif "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[repository][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.answer(404, {"error": "not here"})

    def readable(self, repository: str) -> Files | None:
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return None if repository in self.private and not is_known else self.repositories.get(repository)

    def answer(self, status: int, body: Any, *, code: str = "") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        del format, arguments


class Machine:
    """A folder, and `steer-engine vectors` in it, whose hub is a server of the test."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.endpoint = f"http://127.0.0.1:{port}"

    def run(self, *arguments: str, disk: int | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """disk: bytes that a file may have before the disk is full."""
        given = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.folder / "home")}
        names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        path = os.pathsep.join(each for each in sys.path if each)
        return subprocess.run(
            [sys.executable, "-P", "-m", "steer_engine", "vectors", *arguments], cwd=self.folder, capture_output=True,
            text=True, timeout=120, check=False, preexec_fn=None if disk is None else partial(limit_files, disk),
            env=inherited | {"NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": path} | given | env,
        )  # fmt: skip

    def does(self, *arguments: str, **env: str) -> str:
        done = self.run(*arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fails(self, *arguments: str, disk: int | None = None, **env: str) -> str:
        done = self.run(*arguments, disk=disk, **env)
        assert (done.returncode, done.stdout) == (1, ""), done.stdout
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1
        return done.stderr


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def one(value: float) -> ControlVector:
    return ControlVector(directions={3: np.full(4, value, np.float32)})


def stored(folder: Path, name: str, vector: ControlVector) -> bytes:
    save(vector, folder / name)
    return (folder / name).read_bytes()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = tmp_path / "made"
    made.mkdir()
    ours, gguf = stored(made, "a.safetensors", one(1)), stored(made, "b.gguf", one(2))
    torch.save(torch.arange(20, dtype=torch.float32).reshape(5, 4), made / "p.pt")
    torch.save(torch.full((4,), 7.0), made / "d.pt")
    (made / "x.pt").write_bytes(pickle.dumps(Exploit()))
    Hub.repositories = {
        "org/one": {"README.md": b"# One", "cheerful.safetensors": ours},
        "org/many": {
            "llama/calm.gguf": gguf,
            "calm.safetensors": ours,
            "evil_response_avg_diff.pt": (made / "p.pt").read_bytes(),
            "refusal/direction.pt": (made / "d.pt").read_bytes(),
            "refusal/direction_metadata.json": b'{"layer": 9, "pos": -1}',
            "exploit_diff.pt": (made / "x.pt").read_bytes(),
            "damaged.safetensors": ours[:-3],
            "model.safetensors": SAID.encode(),
        },
        "org/nothing": {"README.md": b"# Nothing"},
        "org/hidden": {"calm.safetensors": ours},
        "org/gated": {"calm.safetensors": ours},
        "org/broken": {},
        "org/silent": {},
    }
    Hub.private, Hub.requests = {"org/hidden"}, []
    (tmp_path / "work").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Machine(tmp_path / "work", server.server_port)
        server.shutdown()


def test_the_layouts_in_use_are_read(machine: Machine) -> None:
    assert machine.does("pull", "hf://org/one") == f"one.safetensors: {one(1).digest}\n"
    machine.does("pull", "hf://org/many@v1/llama/calm.gguf")
    assert load(machine.folder / "calm.safetensors") == one(2)
    assert "calm.safetensors: the file exists" in machine.fails("pull", "hf://org/many/calm.safetensors")
    machine.does("pull", "hf://org/many/calm.safetensors", "--force")
    assert load(machine.folder / "calm.safetensors") == one(1)
    machine.does("pull", "hf://org/many/evil_response_avg_diff.pt", "--out", "evil.safetensors")
    evil = load(machine.folder / "evil.safetensors")
    # Row 0 is of the embeddings, and the last one has the final norm.
    assert {block: row[0] for block, row in evil.directions.items()} == {0: 4.0, 1: 8.0, 2: 12.0}
    machine.does("pull", "hf://org/many/refusal/direction.pt", "--out", "refusal.safetensors")
    refusal = load(machine.folder / "refusal.safetensors")
    assert (refusal.blocks, refusal.directions[8].tolist()) == ((8,), [7.0] * 4)


def test_no_code_of_a_file_runs(machine: Machine) -> None:
    error = machine.fails("pull", "hf://org/many/exploit_diff.pt")
    assert "org/many/exploit_diff.pt: " in error
    assert not list(machine.folder.rglob("pwned"))


def test_a_file_that_is_in_the_cache_needs_no_network(machine: Machine) -> None:
    machine.does("pull", "hf://org/many/calm.safetensors")
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    machine.does("pull", "hf://org/many/calm.safetensors", "--force", **away)
    assert "HF_HUB_OFFLINE" in machine.fails("pull", "hf://org/many/llama/calm.gguf", "--force", **away)
    assert "HF_HUB_OFFLINE" in machine.fails("pull", "hf://org/one", **away)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://org/many", ["7 files", "hf://org/many/calm.safetensors", "llama/calm.gguf"]),
        ("hf://org/many/clam.safetensors", ["no vector clam.safetensors", "calm.safetensors"]),
        ("hf://org/many/model.safetensors", ["1099511627776 bytes"]),
        ("hf://org/many/damaged.safetensors", ["org/many/damaged.safetensors: "]),
        ("hf://org/nothing", ["no file that can be a vector", ".safetensors"]),
        ("hf://org/noone/calm.safetensors", ["no repository org/noone", "spelling", "HF_TOKEN"]),
        ("hf://org/hidden", ["no repository org/hidden", "private", "HF_TOKEN"]),
        ("hf://org/gated", ["gated", "accept its terms at http://127.0.0.1:", "HF_TOKEN"]),
        ("hf://org/broken", ["answered 500", "The hub has a bad day"]),
        ("hf://org/one@nowhere/cheerful.safetensors", ["no revision nowhere", "branch"]),
        ("hf://one", ["'hf://one' is not an address", "hf://OWNER/REPO"]),
        ("hf://org/one/../../etc/passwd", ["is not an address"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_do(machine: Machine, address: str, words: list[str]) -> None:
    error = machine.fails("pull", address, "--out", "out.safetensors")
    for word in words:
        assert word in error
    assert not (machine.folder / "out.safetensors").exists()
    assert not any("GET" in each and "model.safetensors" in each for each in Hub.requests), "too large to download"


def test_a_hub_that_is_away_is_named(machine: Machine) -> None:
    for address in ("hf://org/one", "hf://org/one/cheerful.safetensors"):
        error = machine.fails("pull", address, HF_ENDPOINT="http://127.0.0.1:9")
        assert "http://127.0.0.1:9 is unreachable" in error
        assert "HF_ENDPOINT" in error


@pytest.mark.parametrize("name", ["one", "noone", "gated", "broken", "silent"])
def test_a_password_in_the_hubs_address_is_not_shown(machine: Machine, name: str) -> None:
    """It works, and is in no message. `silent` is the one whose message has the address that the client asked."""
    endpoint = machine.endpoint.replace("//", "//me:very%20secret@")
    done = machine.run("pull", f"hf://org/{name}", HF_ENDPOINT=endpoint)
    assert done.returncode == (0 if name == "one" else 1)
    assert (machine.endpoint in done.stderr) == (name != "one")
    assert "secret" not in done.stdout + done.stderr


def test_a_password_of_a_hub_that_is_away_is_not_shown(machine: Machine) -> None:
    error = machine.fails("pull", "hf://org/one", HF_ENDPOINT="http://me:secret@127.0.0.1:9")
    assert error.startswith("error: http://127.0.0.1:9 is unreachable")


def test_a_password_in_a_servers_address_is_refused(machine: Machine) -> None:
    error = machine.fails("pull", "cheerful", "--url", "http://me:secret@localhost")
    assert error.startswith("error: The URL http://localhost was given with a user or password")
    assert "STEER_ENGINE_API_KEY" in error


def test_a_full_disk_is_not_taken_for_a_hub_that_is_away(machine: Machine) -> None:
    address = "hf://org/one/cheerful.safetensors"
    cache = machine.fails("pull", address, disk=100)
    assert "hub's cache cannot be written" in cache
    assert "HF_HOME" in cache
    machine.does("pull", address)
    target = machine.fails("pull", address, "--out", "other.safetensors", disk=100)  # which is in the cache now
    assert target.startswith("error: other.safetensors: cannot be written (")
    assert sorted(path.name for path in machine.folder.iterdir()) == ["cheerful.safetensors", "home"]


def test_a_cache_that_cannot_be_written_is_named(machine: Machine) -> None:
    (machine.folder / "file").touch()
    error = machine.fails("pull", "hf://org/one", HF_HOME=str(machine.folder / "file"))
    assert "hub's cache cannot be written" in error


def test_what_only_the_hub_has_is_refused_for_a_server(machine: Machine) -> None:
    """A server sends vectors of its own; nothing is requested."""
    error = machine.fails("pull", "cheerful", "--kind", "persona", "--url", machine.endpoint)
    assert "--kind" in error
    assert "hf://" in error
    assert Hub.requests == []


def test_a_private_repository_opens_with_a_token(machine: Machine) -> None:
    machine.does("pull", "hf://org/hidden", "--out", "h.safetensors", HF_TOKEN=TOKEN)
    assert load(machine.folder / "h.safetensors") == one(1)


def test_a_vector_is_uploaded_and_comes_back(machine: Machine) -> None:
    content = stored(machine.folder, "calm.safetensors", one(5))
    assert machine.does("push", "calm.safetensors", "hf://me/vectors", HF_TOKEN=TOKEN) == (
        "hf://me/vectors/calm.safetensors\n"
    )
    assert Hub.repositories["me/vectors"] == {"calm.safetensors": content}
    assert "me/vectors" in Hub.private, "what is made is private"
    again = machine.does("push", "calm.safetensors", "hf://me/vectors", HF_TOKEN=TOKEN)
    assert "the same content is there already" in again
    assert sum("/commit/" in each for each in Hub.requests) == 1
    machine.does("pull", "hf://me/vectors", "--out", "back.safetensors", HF_TOKEN=TOKEN)
    assert load(machine.folder / "back.safetensors") == one(5)


def test_other_content_is_replaced_on_request_only(machine: Machine) -> None:
    before = Hub.repositories["org/one"]["cheerful.safetensors"]
    content = stored(machine.folder, "new.safetensors", one(6))
    address = "hf://org/one/cheerful.safetensors"
    assert "--force" in machine.fails("push", "new.safetensors", address, HF_TOKEN=TOKEN)
    assert Hub.repositories["org/one"]["cheerful.safetensors"] == before
    machine.does("push", "new.safetensors", address, "--force", HF_TOKEN=TOKEN)
    assert Hub.repositories["org/one"]["cheerful.safetensors"] == content
    machine.does("push", "new.safetensors", "hf://me/open", "--public", HF_TOKEN=TOKEN)
    assert "me/open" not in Hub.private


def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(machine: Machine) -> None:
    stored(machine.folder, "calm.safetensors", one(5))
    (machine.folder / "broken.safetensors").write_bytes(b"12345678")
    assert "HF_TOKEN" in machine.fails("push", "calm.safetensors", "hf://me/vectors")
    assert "broken.safetensors: " in machine.fails("push", "broken.safetensors", "hf://me/vectors", HF_TOKEN=TOKEN)
    assert "end in .safetensors" in machine.fails("push", "calm.safetensors", "hf://me/v/calm.gguf", HF_TOKEN=TOKEN)
    assert Hub.requests == []
    assert "may write there" in machine.fails("push", "calm.safetensors", "hf://me/vectors", HF_TOKEN="hf_other")
    assert "me/vectors" not in Hub.repositories
