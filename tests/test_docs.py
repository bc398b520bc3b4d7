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
import tomllib
from pathlib import Path
from typing import get_args

import check_links
import pytest
import yaml
from helpers.doc_blocks import LANGUAGES, RUN_LANGUAGES, Block, all_blocks, blocks_of, commands, request_in
from helpers.family_settings import FORM
from helpers.oracle_when import covered
from typer.testing import CliRunner

from steer_engine.api import registry_routes, routes
from steer_engine.api.middleware import CARRYING_PATHS
from steer_engine.cli.main import app
from steer_engine.cli.serve import help_text
from steer_engine.scope import ScopeWord
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
    """README and documentation are executed, not excused; deployment needs clusters. The notebook has its own test."""
    pages = [block for block in (*SHELL, *PYTHON) if block.page.startswith(("README", "docs/"))]
    candidates = [block for block in pages if block.page != "docs/notebook.md"]
    assert len(candidates) >= 30
    assert sum(block.runs for block in candidates) >= 0.7 * len(candidates)


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


@pytest.mark.parametrize("block", JSON, ids=named)
def test_json_blocks_parse_and_requests_are_valid(block: Block) -> None:
    if (steering := request_in(block)) is not None:
        SteeringSpec.model_validate(steering)


def test_requests_are_found_in_json_blocks() -> None:
    assert sum(request_in(block) is not None for block in JSON) >= 5


def test_the_api_page_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(names) >= 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        source = importlib.util.find_spec(module)
        assert source is not None, name
        assert attribute in getattr(importlib.import_module(module), "__all__", ()), name


def test_the_table_of_routes_is_complete() -> None:
    page = (ROOT / "docs" / "http_api.md").read_text()
    listed = set()
    for first in re.findall(r"^\| (`(?:GET|POST|PUT|DELETE) .*?) \|", page, re.MULTILINE):
        method = ""
        for span in re.findall(r"`([^`]+)`", first):
            method, path = span.split() if " " in span else (method, span)
            listed.add((method, path.partition("?")[0]))
    routers = (routes.router, routes.playground_router, registry_routes.vector_router, registry_routes.preset_router)
    ours = {(method, route.path) for router in routers for route in router.routes for method in route.methods}
    assert listed == ours | {("POST", path) for path in CARRYING_PATHS}


def test_the_readme_names_the_supported_versions() -> None:
    readme = (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    first, beyond = re.match(r"vllm>=([\d.]+),<([\d.]+)", project["optional-dependencies"]["cuda"][0]).groups()
    newest = f"0.{int(beyond.partition('.')[2]) - 1}"
    for badge in (f"Python-%E2%89%A5_{python}-", f"vLLM-{first}_to_{newest}-", "licence-Apache--2.0-"):
        assert f"img.shields.io/badge/{badge}" in readme
    assert f"| vLLM | {first} and {newest};" in readme
    assert f"| Python | {python} and newer |" in readme
    assert f"| {newest} | plugin for stock vLLM" in readme
    assert f"{len(FORM)} architectures against Hugging Face" in readme


def test_every_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "steer-engine" / "Chart.yaml").read_text())
    assert citation["license"] == project["license"]
    assert {citation["version"], chart["version"], str(chart["appVersion"])} == {project["version"]}
    texts = [ROOT / "README.md", *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
    tags = {tag for path in texts for tag in re.findall(r"steer-engine:([\d.]+)-(?:cpu|cuda)\b", path.read_text())}
    assert tags == {project["version"]}


def test_the_picture_of_scopes_is_right() -> None:
    """Each row covers the tokens that the oracle's definitions say. The last column stands for what follows."""
    page = (ROOT / "docs" / "request.md").read_text()
    header, *lines = page.partition("┬")[2].partition("```")[0].splitlines()[1:]
    columns = [(match.start(), match.end()) for match in re.finditer(r"\S+", header)]
    number = {name: place for place, name in enumerate(header.split())}
    tags = {"thinking": "think", "answer": "/think", "tool_calls": "call"}
    ends = {"thinking": "/think", "answer": "think", "tool_calls": "/call"}
    windows = {name: {"after": number[f"<{tags[name]}>"], "until": number[f"<{ends[name]}>"]} for name in tags}

    drawn: dict[str, list[bool]] = {}
    for line in lines:
        label, marks = line[: columns[0][0]].rstrip(), line.ljust(len(header))
        if label.startswith(" "):  # the second line of a scope
            first = list(drawn)[-1]
            drawn[first + label] = drawn.pop(first)
        else:
            drawn[label] = ["■" in marks[start:end] for start, end in columns]
            assert all(set(marks[start:end]) & {"■", "·"} for start, end in columns), line
    for label, row in drawn.items():
        scope = json.loads(label)
        if isinstance(scope, dict):
            scope = {key: number.get(value, windows.get(value, value)) for key, value in scope.items()}
        covers, _ = covered(
            windows.get(scope, scope) if isinstance(scope, str) else scope, [*number.values()], number["r1"]
        )
        assert row == covers.tolist(), label
    assert {label for label in drawn if label.startswith('"')} == {f'"{word}"' for word in get_args(ScopeWord)}
