"""Nothing of ours is importable as `triton_kernels`, however a process starts (DESIGN: a trap)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What a vLLM process does: load the plugins, then look for the package. The last line is the verdict.
ASK = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.utils.import_utils import get_triton_kernels_version, has_triton_kernels
has_triton_kernels()
found = sys.modules.get("triton_kernels")
print("none" if found is None else found.__file__ or "ours", get_triton_kernels_version())
"""
SPAWN = """
import multiprocessing
def ask():
    exec(open({ask!r}).read())
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=ask)
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
"""


def verdict(arguments: list[str], cwd: Path = ROOT, **env: str) -> str:
    """Last line that `python *arguments` prints in `cwd`, on plain environment plus `env`."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def is_none_or_the_real_one(answer: str) -> bool:
    where, version = answer.split()
    return (where == "none" and version == "None") or (where not in ("none", "ours") and version != "None")


def test_install_keeps_the_repository_root_off_the_path(tmp_path: Path) -> None:
    answer = verdict(["-c", "import sys; print(sys.path)"], cwd=tmp_path)
    assert str(ROOT) not in eval(answer)
    assert str(ROOT / "triton_kernels") not in eval(answer)
    probe = "import steer_engine, steer_kernels, importlib.util as u; print(u.find_spec('triton_kernels'))"
    answer = verdict(["-c", probe], cwd=tmp_path)
    assert answer == "None" or "origin=" in answer


def test_the_trap_is_real() -> None:
    """Without the plugin vLLM takes the folder: shows that the tests below can fail."""
    assert verdict(["-c", ASK], VLLM_PLUGINS="").startswith("ours")


def test_dash_c() -> None:
    assert is_none_or_the_real_one(verdict(["-c", ASK]))


def test_dash_m(tmp_path: Path) -> None:
    (tmp_path / "ask_for_triton_kernels.py").write_text(ASK)
    assert is_none_or_the_real_one(verdict(["-m", "ask_for_triton_kernels"], PYTHONPATH=str(tmp_path)))


@pytest.mark.parametrize("kind", ["script", "spawned child"])
def test_script_in_the_root(kind: str, tmp_path: Path) -> None:
    ask = tmp_path / "ask.py"
    ask.write_text(ASK)
    with tempfile.NamedTemporaryFile("w", suffix=".py", prefix="tmp_start_", dir=ROOT) as script:
        script.write(ASK if kind == "script" else SPAWN.format(ask=str(ask)))
        script.flush()
        assert is_none_or_the_real_one(verdict([script.name]))


def test_hiding_undoes_an_answer_that_vllm_cached() -> None:
    code = """
from vllm.utils.import_utils import get_triton_kernels_version, has_triton_kernels
assert has_triton_kernels() and get_triton_kernels_version() is not None
from steer_engine.vllm.plugin import hide_kernel_folder
assert hide_kernel_folder() and not hide_kernel_folder()
print(has_triton_kernels(), get_triton_kernels_version())
"""
    assert verdict(["-c", code], VLLM_PLUGINS="") in ("False None",) or has_vendored_kernels()


def has_vendored_kernels() -> bool:
    """CUDA builds of vLLM bring a copy of the real package; then a yes is right."""
    import importlib.util

    return importlib.util.find_spec("vllm.third_party.triton_kernels") is not None


def test_a_real_package_stays_importable(tmp_path: Path) -> None:
    """In the root and with a real `triton_kernels` installed, that one is found and nothing is hidden."""
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").write_text("")
    code = (
        "from steer_engine.vllm.plugin import hide_kernel_folder; hidden = hide_kernel_folder()\n"
        "import triton_kernels; print(hidden, triton_kernels.__file__)"
    )
    assert verdict(["-c", code], PYTHONPATH=str(tmp_path)) == f"False {tmp_path}/triton_kernels/__init__.py"


def test_vllm_does_not_look_before_the_plugins_are_loaded() -> None:
    """The modules that server, engine core and worker import before they load plugins never ask for the name."""
    code = """
import sys
class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name == "triton_kernels":
            raise SystemExit("asked for triton_kernels at import")
sys.meta_path.insert(0, Recorder())
import vllm.entrypoints.openai.api_server, vllm.v1.engine.core
import vllm.v1.worker.worker_base, vllm.v1.executor.multiproc_executor
print("never asked")
"""
    assert verdict(["-c", code], VLLM_PLUGINS="") == "never asked"
