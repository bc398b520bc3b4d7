"""Packaged models that come in parts, and those whose licence must be accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steer_engine import models
from steer_engine.cli.checks import check_model_name
from steer_engine.errors import ModelError
from steer_engine.models import PACKAGED, PackagedModel, Terms

GEMMA = PACKAGED["gemma3-270m"]
PARTS = [b"GGUF, the first part, ", b"the second, ", b"and the third"]
ACCEPT = "STEER_ENGINE_ACCEPT_LICENSE"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder with the packages of `model`: `whole`, with the terms, and `whole-part1` to `-part3`."""
    folder = tmp_path / "site"
    for name in ("whole", *(f"whole_part{number}" for number in (1, 2, 3))):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the code of a package with a model ran')")
    for number, part in enumerate(PARTS, 1):
        (folder / f"whole_part{number}" / f"model.gguf.part0{number - 1}").write_bytes(part)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def model(site: Path) -> PackagedModel:
    return PackagedModel(
        name="parted",
        title="A model in three parts",
        license="Terms of a Maker",
        distribution="whole",
        version="1.0",
        parts=tuple((f"whole-part{n}", f"whole_part{n}/model.gguf.part0{n - 1}") for n in (1, 2, 3)),
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        with_parts=True,
        terms=Terms(url="https://maker.test/terms", copy="whole/TERMS.html"),
    )


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """An empty cache, and a fast conversion that records name and content of each source."""
    monkeypatch.setenv("STEER_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(ACCEPT, raising=False)
    seen: list[tuple[str, bytes]] = []

    def convert(source: Path, target: Path) -> None:
        seen.append((source.name, source.read_bytes()))
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_in_child", convert)
    return seen


def get(model: PackagedModel, *, accept_license: bool = True) -> tuple[Path, list[str]]:
    said: list[str] = []
    return models.get_model(model, said.append, accept_license=accept_license), said


def assert_refused(model: PackagedModel, pattern: str) -> None:
    """`get` fails with one line and leaves nothing in the cache."""
    with pytest.raises(ModelError, match=pattern) as caught:
        get(model)
    assert "\n" not in caught.value.message
    cache = models.cache_dir()
    assert [path for path in cache.rglob("*") if path.is_dir() and path.name != "models"] == []


def test_parts_are_joined_in_order_and_only_the_checkpoint_is_kept(
    model: PackagedModel, converted: list[tuple[str, bytes]]
) -> None:
    folder, said = get(model)
    assert converted == [("model.gguf", b"".join(PARTS))]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", models.MANIFEST]
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
    assert models.find_fault(folder, model) is None
    assert "you accept the Terms of a Maker, https://maker.test/terms" in said[0]


@pytest.mark.parametrize("damage", ["a byte", "short", "swapped"])
def test_wrong_content_is_refused(
    model: PackagedModel, site: Path, converted: list[tuple[str, bytes]], damage: str
) -> None:
    first, second = (site / f"whole_part{n}" / f"model.gguf.part0{n - 1}" for n in (1, 2))
    if damage == "swapped":
        first.write_bytes(PARTS[1])
        second.write_bytes(PARTS[0])
    else:
        second.write_bytes(b"The" + PARTS[1][3:] if damage == "a byte" else PARTS[1][:-1])
    assert_refused(
        model, r"part00 and the parts after it: SHA-256 .* not that of whole==1\.0.* --force-reinstall whole"
    )
    assert converted == []


def test_a_missing_part_is_named(model: PackagedModel, site: Path, converted: list[tuple[str, bytes]]) -> None:
    (site / "whole_part2" / "model.gguf.part01").unlink()
    assert_refused(model, r"model\.gguf\.part01 of the package whole-part2==1\.0 is missing.*pip install --force-")
    shutil.rmtree(site / "whole_part2-1.0.dist-info")
    assert_refused(model, r"needs the package whole-part2==1\.0, which is not installed.*pip install whole==1\.0$")
    assert converted == []


def test_a_part_that_cannot_be_read_is_not_a_fault_of_the_cache(
    model: PackagedModel, converted: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*paths: Path) -> str:
        raise PermissionError(13, "Permission denied", str(paths[0]))

    monkeypatch.setattr(models, "sha256_of", unreadable)
    assert_refused(model, r"package whole==1\.0 cannot be read .*Permission denied.*part00.*--force-reinstall")
    assert converted == []


@pytest.mark.parametrize("accepted", [None, "", "another-model", "parted-2"])
def test_without_acceptance_nothing_is_made(
    model: PackagedModel,
    site: Path,
    converted: list[tuple[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    accepted: str | None,
) -> None:
    if accepted is not None:
        monkeypatch.setenv(ACCEPT, accepted)
    monkeypatch.setitem(PACKAGED, "parted", model)
    for ask in (lambda: get(model, accept_license=False), lambda: check_model_name("parted")):
        with pytest.raises(ModelError) as caught:
            ask()
        message = caught.value.message
        assert f"Terms of a Maker: https://maker.test/terms and in {site / 'whole/TERMS.html'}." in message
        assert f"steer-engine models get parted --accept-license, or {ACCEPT}=parted" in message
        assert (repr(accepted) in message) == bool(accepted)
        assert "\n" not in message
    assert not models.cache_dir().exists()


def test_the_terms_come_before_the_package(
    model: PackagedModel, converted: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has not installed it yet reads where the terms are first."""
    absent = dataclasses.replace(model, distribution="no-such", parts=(("no-such-part1", "a"),))
    with pytest.raises(ModelError, match=r"https://maker\.test/terms\. To accept them"):
        get(absent, accept_license=False)
    monkeypatch.setitem(PACKAGED, "parted", absent)
    monkeypatch.setenv(ACCEPT, "parted")
    with pytest.raises(ModelError, match="pip install no-such=="):
        check_model_name("parted")


@pytest.mark.parametrize("value", ["parted", "smollm2-135m, parted"])
def test_the_environment_accepts_by_name(
    model: PackagedModel, converted: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(ACCEPT, value)
    get(model, accept_license=False)
    assert len(converted) == 1


def test_a_checkpoint_that_is_there_is_used_without_asking_again(
    model: PackagedModel, site: Path, converted: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = get(model)
    shutil.rmtree(site)
    monkeypatch.setitem(PACKAGED, "parted", model)
    check_model_name("parted")
    assert models.resolve_model("parted") == str(folder)
    assert len(converted) == 1


def test_only_models_with_terms_ask(converted: list[tuple[str, bytes]]) -> None:
    assert [name for name, each in PACKAGED.items() if each.terms] == ["gemma3-270m"]
    assert next(iter(PACKAGED)) == "smollm2-135m"
    get(PACKAGED["smollm2-135m"], accept_license=False)
    assert [name for name, _ in converted] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


@pytest.mark.parametrize("words", [["models", "get", "gemma3-270m"], ["serve", "gemma3-270m"]])
def test_the_command_line_says_where_the_terms_are(tmp_path: Path, words: list[str]) -> None:
    environment = {"PATH": "/usr/bin:/bin", "STEER_ENGINE_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-P", "-m", "steer_engine", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: Model gemma3-270m is under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
    )
    assert "steer-engine models get gemma3-270m --accept-license" in line
    assert list(tmp_path.iterdir()) == []
