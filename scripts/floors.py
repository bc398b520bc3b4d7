"""Run the command line and unit tests with the lowest versions that pyproject.toml allows.

    make floors

Makes a fresh environment in a temporary folder, with `name==floor` for each dependency and for those of EXTRAS, and
without vLLM, so that it also shows what works without it. Needs a package index, and a few minutes.
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

EXTRAS = ("datasets", "derive", "report")
"""Without vLLM's own, whose versions vLLM decides, and that of the demo, which needs torch."""

TEST_TOOLS = (
    "hypothesis",
    "httpx",
    "jsonschema",
    "pytest>=8.4",
    "pytest-asyncio>=1.0",
    "pytest-timeout>=2.3",
    "threadpoolctl",
)

NEED_MORE = ("damaged_folder", "importers", "mirror", "reft_format", "schema", "torch_format", "vllm_lens_format")
"""Tests of tests/vectors that need torch, zstandard or fsspec, which come by an extra."""

TESTS = (
    "tests/vectors",
    "tests/cli/test_main.py",
    "tests/cli/test_first_hour.py",
    "tests/derive/test_methods.py",
    "tests/derive/test_text_sources.py",
    "tests/derive/test_texts.py",
)

WITHOUT_VLLM = (
    "(vectors or test_main or help or extra or groups or fault_of_a_pairs or test_methods or test_text_sources "
    "or test_texts) and not missing_folder and not names_a_missing_extra and not scikit_learn and not as_repeng "
    "and not published_schema"
)
"""Which of them run: a start checks first whether vLLM is there, two tests compare with scikit-learn, and one with a
schema that the newest pydantic wrote."""


def floors() -> list[str]:
    """`name==floor` for each dependency of the project and of EXTRAS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found = []
    for requirement in [*project["dependencies"], *(each for extra in EXTRAS for each in extras[extra])]:
        matched = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
        if matched is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no floor; write NAME>=VERSION.")
        found.append(f"{matched[1]}=={matched[2]}")
    return sorted(set(found))


def main() -> int:
    pinned = floors()
    print(*pinned, sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="floors") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        run = [str(python), "-P", "-m"]
        subprocess.run([*run, "pip", "install", "--quiet", *pinned, *TEST_TOOLS], check=True)
        subprocess.run([*run, "pip", "install", "--quiet", "--no-deps", str(ROOT)], check=True)
        # As it is installed: the tests below import the command line instead.
        subprocess.run([Path(folder, "bin", "steer-engine"), "--help"], check=True, stdout=subprocess.DEVNULL)
        left_out = [word for name in NEED_MORE for word in ("--ignore", f"tests/vectors/test_{name}.py")]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        tests = [*run, "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *left_out, "-k", WITHOUT_VLLM]
        return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
