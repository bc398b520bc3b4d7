"""Rules of this repository that no linter checks."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import floors
import pytest
import structure
import yaml

import steer_engine

ROOT = Path(__file__).resolve().parents[1]


def tracked(*patterns: str) -> list[Path]:
    """Tracked files that match. Skips the test outside a git checkout (an sdist)."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def make_target(name: str) -> list[str]:
    """Command lines of a Makefile target, with $(BIN) replaced."""
    found = re.search(rf"^{name}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found, f"the Makefile has no target {name}"
    return [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_pre_commit_runs_what_make_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks == make_target("check")


def test_ci_runs_the_checks_and_then_the_test_command_of_the_readme() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    readme = (ROOT / "README.md").read_text()
    assert lines == ["make setup", "make check", "make test"]
    assert re.search(r"^make test\b", readme, re.MULTILINE)


def test_public_api_is_small_and_loads() -> None:
    assert len(steer_engine.__all__) <= 8
    assert dir(steer_engine) == sorted(steer_engine.__all__)
    for name in set(steer_engine.__all__) - {"LLM"}:  # tests/engines loads that one
        assert getattr(steer_engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'steer'; it has LLM"):
        _ = steer_engine.steer


def test_the_version_is_consistent() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == steer_engine.__version__


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.endpoint_plugins"])
def test_entry_points_load(group: str) -> None:
    (ours,) = [point for point in entry_points(group=group) if point.name == "steer_engine"]
    assert callable(ours.load())


def test_no_machine_path_is_committed() -> None:
    pattern = re.compile(r"/(?:home|root|work|Users)/\w+")
    found = [path.name for path in tracked("*.py", "*.md", "*.toml", "*.yml", "*.yaml", "Makefile", "*.sh")
              if pattern.search(path.read_text()) and path != Path(__file__)]  # fmt: skip
    assert found == []


def test_no_module_has_more_than_400_lines() -> None:
    long = {path.name: count for path in tracked("steer_engine/**.py", "triton_kernels/**.py")
            if (count := len(path.read_text().splitlines())) > 400}  # fmt: skip
    assert long == {}


def test_every_folder_of_the_packages_is_a_package() -> None:
    """A wheel silently lacks a folder without `__init__.py`."""
    for top in (ROOT / "steer_engine", ROOT / "triton_kernels" / "steer_kernels"):
        folders = {path.parent for path in top.rglob("*.py")}
        assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_map_names_files_that_exist() -> None:
    roots = (ROOT, ROOT / "steer_engine", ROOT / "triton_kernels" / "steer_kernels")
    pages = [*ROOT.glob("*.md"), ROOT / "docs" / "architecture.md"]
    named = {name for page in pages for name in re.findall(r"`([\w/]+\.py)`", page.read_text())}
    assert len(named) > 40
    assert [name for name in sorted(named) if not any((root / name).is_file() for root in roots)] == []


def test_contributing_quotes_the_targets_of_structure() -> None:
    quoted = re.findall(r"\(at most ([\d.]+)\)", (ROOT / "CONTRIBUTING.md").read_text())
    assert quoted == [f"{each.target:g}" for each in structure.measure(structure.PACKAGE) if each.target is not None]


def test_every_dependency_has_one_lowest_version() -> None:
    """`make floors` installs these, and takes minutes; a dependency without a floor stops it."""
    pinned = floors.floors()
    names = [requirement.split("==")[0] for requirement in pinned]
    assert len(set(names)) == len(names), "two extras name different floors"
    assert {"numpy", "pydantic", "typer", "ray", "scipy", "matplotlib", "datasets"} <= set(names)
    tests = (ROOT / path for path in floors.TESTS)
    assert [path for path in tests if not path.exists()] == []


def test_the_tests_of_make_floors_need_no_torch() -> None:
    """Its environment has none, and one file that imports it ends the run before a test."""
    left_out = {f"test_{name}.py" for name in floors.NEED_MORE}
    named = [ROOT / path for path in floors.TESTS]
    files = [file for path in named for file in (path.glob("*.py") if path.is_dir() else [path])]
    foreign = re.compile(r"^(?:import|from) (?:torch|transformers|vllm|zstandard|sklearn)\b", re.MULTILINE)
    found = {file.name for file in files if foreign.search(file.read_text())}
    assert found <= left_out
