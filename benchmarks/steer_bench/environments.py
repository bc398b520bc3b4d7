"""Environments of peers: made from PyPI under `.bench/`, beside the interpreter that runs this.

Each sees the packages of this interpreter too, after its own, so that all that are compared run on the same vLLM and
torch. What this interpreter has installed in place (Steer Engine) is not seen: it is found through a `.pth` file, and
those are read in an environment's own folder only.
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
    """requirements: all that is installed; nothing they depend on comes along."""

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
        """Made for this very list and interpreter."""
        mark = self.folder / MADE
        return mark.exists() and json.loads(mark.read_text()) == self._mark

    @property
    def _mark(self) -> dict[str, object]:
        return {**asdict(self), "requirements": list(self.requirements), "site_packages": _site_packages()}


LENS = Environment(name="vllm-lens", requirements=("vllm-lens==1.3.0", "cloudpickle>=3", "zstandard>=0.23"))
INTERP = Environment(name="interp-engine", requirements=("interp-engine==1.14.2", "einops>=0.8"))
REPENG = Environment(name="repeng", requirements=("repeng==0.4.0", "gguf>=0.17", "scikit-learn>=1.5"))


def python_of(environment: Environment) -> str:
    """The interpreter of an environment, which is made where it is missing or was made for something else.

    Raises:
        ArmFailed: pip could not install it; says what pip said.
    """
    if not environment.is_made:
        venv.create(environment.folder, clear=True, with_pip=True)
        # The peers may ask for another Python or vLLM than there is: then whether they run is what we measure.
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
