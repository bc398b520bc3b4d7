"""The documentation, without running it: links, marks, the syntax of blocks, the names in commands and requests.

`tests/servers/test_doc_blocks.py` runs the blocks.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import check_links
import pytest
import yaml
from helpers.doc_blocks import LANGUAGES, RUN_LANGUAGES, Block, all_blocks, blocks_of, commands
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.cli.serve import help_text
from steer_engine.spec import SteeringSpec

ROOT = Path(__file__).resolve().parents[1]
SHELL = [block for block in all_blocks() if block.language == "sh"]
PYTHON = [block for block in all_blocks() if block.language == "python"]
JSON = [block for block in all_blocks() if block.language == "json"]
SERVERS = ("serve", "batch", "doctor")
"""Commands that accept vLLM's flags."""


def named(block: Block) -> str:
    return block.id


@pytest.mark.parametrize("page", check_links.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert check_links.faults_of(page) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](missing.md)", "missing.md does not exist"),
        ("![a](missing.png)", "missing.png does not exist"),
        ('<img src="missing.png">', "missing.png does not exist"),
        ("[a](other.md#absent)", "other.md has no heading #absent"),
        ("[a](#absent)", "page.md has no heading #absent"),
        ("[a](../README.md)", "../README.md is not part of the documentation site"),
        ("see `docs/absent.md`", "there is no docs/absent.md"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Readme\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## The `same` words: here\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        f"# Page\n\n```sh\n[a](missing.md)\n```\n<!-- [a](missing.md) -->\n[b](other.md#the-same-words-here) {text}\n"
    )
    assert check_links.faults_of(page, tmp_path) == [f"docs/page.md:7: {fault}"]


def test_the_site_has_every_page() -> None:
    navigation = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2])
    assert sorted(navigation) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_examples_are_all_listed() -> None:
    """The first level of the folder; a link checker's test finds names that do not exist."""
    page = (ROOT / "docs" / "examples.md").read_text()
    listed = {name.rstrip("/") for name in re.findall(r"^\| `examples/([\w/.]+)`", page, re.MULTILINE)}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "examples"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert listed == {Path(path).parts[1] for path in tracked}


def test_a_block_has_its_marks(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "<!-- a comment -->\n\n<!-- before: a=1\nb=2 -->\n<!-- not run: needs a cluster -->\n```sh\necho $a\n```\n\n"
        '=== "Tab"\n\n    ```python\n    if a:\n        b()\n    ```\n\n```text\nno\n```\n'
    )
    shell, python, text = blocks_of(Path("page.md"), tmp_path)
    assert (shell.line, shell.text, shell.before, shell.not_run) == (6, "echo $a\n", "a=1\nb=2", "needs a cluster")
    assert (python.line, python.text, python.before, python.runs) == (12, "if a:\n    b()\n", "", True)
    assert [shell.runs, text.runs] == [False, False]


def test_commands_are_found_where_the_shell_would_start_them() -> None:
    text = """A=1 steer-engine a --b "c d" && x/bin/steer-engine e \\
        f > g  # steer-engine no
        echo steer-engine no | steer-engine h
    """
    assert commands(text, "steer-engine") == [["a", "--b", "c d"], ["e", "f"], ["h"]]


@pytest.mark.parametrize("block", all_blocks(), ids=named)
def test_language_and_marks_are_known(block: Block) -> None:
    assert block.language in LANGUAGES
    assert not (block.not_run or block.before) or block.language in RUN_LANGUAGES
    assert len(block.not_run.split()) != 1, "give the reason in words"


def test_most_blocks_run() -> None:
    """The documentation is executed, not excused."""
    candidates = [*SHELL, *PYTHON]
    assert len(candidates) >= 35
    assert sum(block.runs for block in candidates) >= 0.6 * len(candidates)


@pytest.mark.parametrize("block", SHELL, ids=named)
def test_shell_blocks_parse(block: Block) -> None:
    for text in (block.before, block.text):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@functools.cache
def flags_of(*words: str) -> str:
    """The help of a command; for commands that accept vLLM's flags, with the source that declares them."""
    if words[0] in SERVERS:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        vllm = Path(spec.origin).parent
        declared = [vllm / "engine" / "arg_utils.py", *(vllm / "entrypoints").rglob("cli_args.py")]
        source = "".join(path.read_text() for path in declared)
        own = "".join((ROOT / "steer_engine" / "cli" / f"{name}.py").read_text() for name in SERVERS)
        fields = re.sub(r"^    (\w+): ", lambda field: f"--{field[1].replace('_', '-')} ", source, flags=re.MULTILINE)
        return help_text() + fields + own
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("block", [block for block in SHELL if commands(block.text, "steer-engine")], ids=named)
def test_commands_and_their_flags_exist(block: Block) -> None:
    groups = {group.name for group in app.registered_groups}
    for words in commands(block.text, "steer-engine"):
        command = words[: 2 if words[0] in groups else 1]
        known = flags_of(*command)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(flag)}\b(?!-)", known), f"{' '.join(command)} has no {flag}"


@pytest.mark.parametrize("block", PYTHON, ids=named)
def test_python_blocks_compile_and_import_what_exists(block: Block) -> None:
    tree = ast.parse(block.before + "\n" + block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "steer_engine":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                exported = getattr(module, "__all__", dir(module))
                assert name.name in exported, f"{node.module} has no {name.name}"


def request_in(value: Any) -> Any:
    """The steering of a request, or None if this is (a part of) an answer."""
    if "model" in value:
        return value["steering"]
    return value if "edits" in value or isinstance(value.get("probes"), list) else None


@pytest.mark.parametrize("block", JSON, ids=named)
def test_json_blocks_parse_and_requests_are_valid(block: Block) -> None:
    value = json.loads(block.text)
    if "digest" not in value and (steering := request_in(value)) is not None:
        SteeringSpec.model_validate(steering)


def test_requests_are_found_in_json_blocks() -> None:
    found = [request_in(json.loads(block.text)) for block in JSON]
    assert sum(steering is not None for steering in found) >= 5


def test_the_api_page_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(names) >= 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        source = importlib.util.find_spec(module)
        assert source is not None, name
        assert attribute in getattr(importlib.import_module(module), "__all__", ()), name


def test_citation_and_project_agree() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["cff-version"] == "1.2.0"
