"""Run the command line and unit tests with the lowest versions that pyproject.toml allows.

    make floors

Makes a fresh environment in a temporary folder, with `name==floor` for each dependency and without vLLM, so that it
also shows what works before an extra is installed. Needs a package index, and a few minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TEST_TOOLS = ("hypothesis", "httpx", "jsonschema", "pytest>=8.4", "pytest-asyncio>=1.0", "pytest-timeout>=2.3")

NEED_MORE = ("damaged_folder", "importers", "mirror", "schema", "torch_format", "vllm_lens_format")
"""Tests of tests/vectors that need torch, zstandard or fsspec, which come by an extra."""

TESTS = ("tests/vectors", "tests/cli/test_main.py", "tests/cli/test_first_hour.py")

WITHOUT_VLLM = "(vectors or test_main or help or extra or groups or fault_of_a_pairs) and not missing_folder"
"""Which of them run: a start checks first whether vLLM is there."""


def floors() -> list[str]:
    """`name==floor` for each dependency of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for requirement in project["dependencies"]:
        matched = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
        if matched is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no floor; write NAME>=VERSION.")
        found.append(f"{matched[1]}=={matched[2]}")
    return found


def main() -> int:
    pinned = floors()
    print(*pinned, sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="floors") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        run = [str(python), "-P", "-m"]
        subprocess.run([*run, "pip", "install", "--quiet", *pinned, *TEST_TOOLS], check=True)
        subprocess.run([*run, "pip", "install", "--quiet", "--no-deps", str(ROOT)], check=True)
        left_out = [word for name in NEED_MORE for word in ("--ignore", f"tests/vectors/test_{name}.py")]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        tests = [*run, "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *left_out, "-k", WITHOUT_VLLM]
        return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
