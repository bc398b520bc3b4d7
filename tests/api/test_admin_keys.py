"""Keys come from the environment or a file, several at once, and are never guessed by time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.damage import SPECIAL

from steer_engine.api.routing import HEADER, AdminKeys
from steer_engine.settings import ADMIN_KEY_FILE_ENV, ADMIN_KEYS_ENV

OLD, NEW = "old-key-0123456789", "new-key-0123456789"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEYS_ENV, raising=False)
    monkeypatch.delenv(ADMIN_KEY_FILE_ENV, raising=False)


def test_without_a_key_nobody_may() -> None:
    keys = AdminKeys.from_environment()
    assert not keys.configured
    for headers in ({}, {HEADER: ""}, {"authorization": "Bearer "}, {HEADER: OLD}):
        assert not keys.allow(headers)


def test_either_of_several_keys_in_either_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEYS_ENV, f"{OLD}, {NEW}")
    keys = AdminKeys.from_environment()
    assert keys.configured
    assert keys.plain_keys() == [OLD, NEW]
    for key in (OLD, NEW):
        assert keys.allow({HEADER: key})
        assert keys.allow({"authorization": f"Bearer {key}"})
        assert keys.allow({"authorization": f"bearer {key}", HEADER: "wrong"})
    for headers in (
        {},
        {HEADER: ""},
        {HEADER: OLD[:-1]},
        {HEADER: OLD + "x"},
        {HEADER: "é" * 20},
        {HEADER: "\udcff" * 20},
        {"authorization": OLD},
        {"authorization": f"Basic {OLD}"},
        {"authorization": "Bearer"},
    ):
        assert not keys.allow(headers)


def test_the_file_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    monkeypatch.setenv(ADMIN_KEY_FILE_ENV, str(file))
    keys = AdminKeys.from_environment()
    assert not keys.configured
    file.write_text(f"# rotated monthly\n{OLD}\n\n")
    assert keys.allow({HEADER: OLD})
    assert not keys.allow({HEADER: "# rotated monthly"})
    assert keys.plain_keys() == [OLD]
    replaced = tmp_path / "keys.new"
    replaced.write_text(f"{NEW}\n")
    os.replace(replaced, file)
    assert keys.allow({HEADER: NEW})
    assert not keys.allow({HEADER: OLD})
    file.unlink()
    assert not keys.allow({HEADER: NEW})


def test_short_keys_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(ADMIN_KEYS_ENV, "secret")
    keys = AdminKeys.from_environment()
    assert not keys.configured
    assert not keys.allow({HEADER: "secret"})
    assert keys.plain_keys() == []
    assert "secret" not in caplog.text
    assert "6 characters" in caplog.text


def test_a_byte_order_mark_is_no_part_of_the_first_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{OLD}\n{NEW}\n", "utf-8-sig")
    monkeypatch.setenv(ADMIN_KEY_FILE_ENV, str(file))
    keys = AdminKeys.from_environment()
    assert keys.allow({HEADER: OLD})
    assert keys.allow({HEADER: NEW})
    assert keys.plain_keys() == [OLD, NEW]


def test_a_file_that_is_not_text_locks_nobody_else_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{NEW}\n", "utf-16")
    monkeypatch.setenv(ADMIN_KEY_FILE_ENV, str(file))
    monkeypatch.setenv(ADMIN_KEYS_ENV, OLD)
    keys = AdminKeys.from_environment()
    assert keys.allow({HEADER: OLD})
    assert not keys.allow({HEADER: NEW})
    assert keys.plain_keys() == [OLD]
    assert str(file) in caplog.text
    assert "not UTF-8" in caplog.text


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.timeout(20)
def test_a_file_that_cannot_be_read_holds_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    monkeypatch.setenv(ADMIN_KEYS_ENV, OLD)
    monkeypatch.setenv(ADMIN_KEY_FILE_ENV, str(tmp_path / "keys"))
    SPECIAL[kind](tmp_path / "keys")
    keys = AdminKeys.from_environment()
    assert keys.allow({HEADER: OLD})
    assert not keys.allow({HEADER: NEW})
    assert keys.plain_keys() == [OLD]
