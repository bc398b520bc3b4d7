"""`steer-engine vectors` and `steer-engine presets` against a real server, keys from the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from helpers.living import ADMIN, INFERENCE, along, complete, tokens
from helpers.server_process import Server
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.errors import RegistryError, SteeringRequestError, VectorFileError
from steer_engine.settings import ADMIN_KEY_ENV, API_KEY_ENVS, URL_ENV
from steer_engine.vectors import load, save


@pytest.fixture(autouse=True)
def _operator(living: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in API_KEY_ENVS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ADMIN_KEY_ENV, ADMIN)
    monkeypatch.setenv(URL_ENV, living.url)
    monkeypatch.chdir(tmp_path)


def call(*words: str) -> str:
    result: Result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_add_list_pull_and_remove(living: Server, tmp_path: Path) -> None:
    save(along(31), tmp_path / "mine.safetensors")
    assert "(new)" in call("vectors", "add", "mine.safetensors")
    assert "(new)" not in call("vectors", "add", "mine.safetensors", "--url", f"{living.url}/v1/")
    assert along(31).digest[:20] in call("vectors", "list")
    assert complete(living, steering={"edits": [{"vector": "mine"}]}).status_code == 200
    call("vectors", "pull", "mine", "--out", "back.gguf")
    call("vectors", "pull", along(31).digest, "--out", "back.safetensors")
    assert load(tmp_path / "back.gguf") == load(tmp_path / "back.safetensors") == along(31)
    with pytest.raises(VectorFileError, match="--force"):
        call("vectors", "pull", "mine", "--out", "back.gguf")
    call("vectors", "pull", "mine", "--out", "back.gguf", "--force")
    assert along(31).digest in call("vectors", "rm", "mine")
    with pytest.raises(RegistryError, match="404"):
        call("vectors", "rm", "mine")


def test_what_a_name_stands_for_is_replaced_only_when_asked(tmp_path: Path) -> None:
    for axis, name in ((32, "one"), (33, "two")):
        save(along(axis), tmp_path / f"{name}.safetensors")
    call("vectors", "add", "one.safetensors", "--name", "it")
    with pytest.raises(RegistryError, match="409"):
        call("vectors", "add", "two.safetensors", "--name", "it")
    assert along(33).digest in call("vectors", "add", "two.safetensors", "--name", "it", "--replace")
    call("vectors", "rm", "it")


def test_presets(living: Server, tmp_path: Path) -> None:
    spec = {"edits": [{"vector": "house", "scale": -2.0}]}
    (tmp_path / "calm.json").write_text(json.dumps(spec))
    assert "(new)" in call("presets", "put", "calm", "calm.json")
    assert json.loads(call("presets", "show", "calm")) == spec
    assert "calm" in call("presets", "list")
    by_name, spelled = complete(living, model="tiny:calm"), complete(living, steering=spec)
    assert tokens(by_name) == tokens(spelled)
    with pytest.raises(RegistryError, match="409"):
        call("presets", "put", "calm", '{"edits": [{"vector": "house"}]}')
    call("presets", "put", "calm", '{"edits": [{"vector": "house"}]}', "--replace")
    call("presets", "rm", "calm")
    with pytest.raises(RegistryError, match="404"):
        call("presets", "show", "calm")


@pytest.mark.parametrize("spec", ["nowhere.json", "{", '{"edits": 1'])
def test_a_preset_that_cannot_be_read_never_leaves_this_machine(spec: str) -> None:
    with pytest.raises(SteeringRequestError, match="JSON"):
        call("presets", "put", "calm", spec)


def test_show_takes_a_vector_of_the_server(tmp_path: Path) -> None:
    save(along(35), tmp_path / "mine.safetensors")
    call("vectors", "add", "mine.safetensors", "--name", "theirs")
    of_file, by_name = call("vectors", "show", "mine.safetensors"), call("vectors", "show", "theirs")
    assert by_name == of_file == call("vectors", "show", along(35).digest)
    assert along(35).digest in by_name
    call("vectors", "rm", "theirs")
    with pytest.raises(RegistryError, match="404"):
        call("vectors", "show", "theirs")
    with pytest.raises(VectorFileError, match=r"gone\.gguf"):
        call("vectors", "show", "gone.gguf")


def test_check_says_what_a_request_would_get(living: Server) -> None:
    spec = {"edits": [{"vector": "house", "scale": 2.0}]}
    found = json.loads(call("presets", "check", json.dumps(spec)))
    assert found["digest"] == complete(living, steering=spec).headers["X-Steering"]
    assert found["rows"] == 1
    with pytest.raises(RegistryError, match="404.*nobody"):
        call("presets", "check", '{"edits": [{"vector": "nobody"}]}')


def test_status(living: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(call("status"))
    assert (found["model"], found["limits"]["max_edits"]) == ("tiny", 8)
    assert found["armed_blocks"] == "0-2"
    assert "stats" not in found
    assert json.loads(call("status", "--counters"))["stats"]["engine"]["ok"]
    with pytest.raises(RegistryError, match="unreachable"):
        call("status", "--url", "http://127.0.0.1:1")


def test_mistakes_are_one_sentence_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(along(34), tmp_path / "mine.safetensors")
    monkeypatch.setenv(ADMIN_KEY_ENV, "not the key of this server")
    monkeypatch.setenv(API_KEY_ENVS[0], INFERENCE)
    assert "house" in call("vectors", "list")
    with pytest.raises(RegistryError, match=f"401: .*{ADMIN_KEY_ENV}"):
        call("vectors", "add", "mine.safetensors")
    monkeypatch.delenv(API_KEY_ENVS[0])
    monkeypatch.delenv(ADMIN_KEY_ENV)
    with pytest.raises(RegistryError, match="401"):
        call("vectors", "list")
    with pytest.raises(RegistryError, match=URL_ENV):
        call("vectors", "list", "--url", "http://127.0.0.1:1")
    with pytest.raises(RegistryError, match="https://"):
        call("vectors", "list", "--url", "file:///etc/passwd")
    (tmp_path / "mine.safetensors").write_bytes(b"no")
    with pytest.raises(VectorFileError):
        call("vectors", "add", "mine.safetensors")


def test_a_redirect_does_not_take_the_keys_along(tmp_path: Path) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/stolen")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(RegistryError, match="302"):
                call("vectors", "list", "--url", f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert [path.partition("?")[0] for path in seen] == ["/v1/steering/vectors"]
