"""Python environments of the peers, created from PyPI under `.bench/`.

Each environment can also import the packages of this interpreter, so that all sides use the same vLLM and torch. It
cannot import the editable install of Steer Engine: that uses a `.pth` file, and Python reads `.pth` files only in the
environment's own folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from steer_bench.process import ArmFailed

FOLDER = Path(__file__).resolve().parents[2] / ".bench"
MADE = "made.json"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """requirements: the packages to install, without their dependencies."""

    name: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def is_made(self) -> bool:
        """True if the environment exists for these requirements and this interpreter."""
        mark = self.folder / MADE
        return mark.exists() and json.loads(mark.read_text()) == self._mark

    @property
    def _mark(self) -> dict[str, object]:
        return {**asdict(self), "requirements": list(self.requirements), "site_packages": _site_packages()}


LENS = Environment(name="vllm-lens", requirements=("vllm-lens==1.3.0", "cloudpickle>=3", "zstandard>=0.23"))
INTERP = Environment(name="interp-engine", requirements=("interp-engine==1.14.2", "einops>=0.8"))
REPENG = Environment(name="repeng", requirements=("repeng==0.4.0", "gguf>=0.17", "scikit-learn>=1.5"))


def python_of(environment: Environment) -> str:
    """Path of the environment's interpreter. Creates the environment if it is missing or outdated.

    Raises:
        ArmFailed: pip failed; the message has the end of its output.
    """
    if not environment.is_made:
        venv.create(environment.folder, clear=True, with_pip=True)
        # A peer may require another Python or vLLM version. We try to run it anyway.
        done = subprocess.run(
            [environment.python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python",
             *environment.requirements],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ArmFailed(f"{environment.name} cannot be installed: {done.stderr.strip()[-600:]}")
        site = environment.folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        (site / "same_packages.pth").write_text(_site_packages() + "\n")
        (environment.folder / MADE).write_text(json.dumps(environment._mark))
    return str(environment.python)


def _site_packages() -> str:
    return sysconfig.get_path("purelib")
