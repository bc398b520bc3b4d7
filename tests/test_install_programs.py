"""scripts/install_programs.sh installs what is missing, or says why not; it waits for no network and no password."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from run_tests import PROGRAMS, PROGRAMS_ENV

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "env", "sleep", "sort", "timeout", "touch", "tr", "chmod")
PACKAGES = {"chromium", "nginx-light", "nodejs", "openssl", "prometheus"}

APT_THAT_WORKS = """
echo "$*" >> "$CALLS"
case "$*" in
*--download-only*) ;;
*" install "*)
    for name in chromium nginx node openssl prometheus promtool; do touch "$BIN/$name"; chmod +x "$BIN/$name"; done
    ;;
esac
"""


class Machine:
    """A machine that has the tools of the script, and what a test gives it."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)
        self.give("id", "echo 0")

    def give(self, program: str, text: str = "") -> None:
        (self.bin / program).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (self.bin / program).chmod(0o755)

    def run(self, script: Path = ROOT / "scripts" / "install_programs.sh") -> subprocess.CompletedProcess[str]:
        places = dict.fromkeys(("PATH", "STEER_PROGRAMS_PATH", "BIN"), str(self.bin))
        env = {**places, "CALLS": str(self.calls), "STEER_PROGRAMS_SECONDS": "1"}
        return subprocess.run([script], env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_is_done_where_all_is_there(machine: Machine) -> None:
    machine.give("apt-get", APT_THAT_WORKS)
    for program in PROGRAMS:
        machine.give(program)
    assert machine.run().returncode == 0
    assert not machine.calls.exists()


def test_what_is_missing_is_installed(machine: Machine) -> None:
    machine.give("apt-get", APT_THAT_WORKS)
    machine.give("openssl")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    update, download, install = (line.split() for line in machine.calls.read_text().splitlines())
    assert "update" in update
    assert "--download-only" in download
    assert set(install) >= {"--yes", "--no-install-recommends", *(PACKAGES - {"openssl"})}
    assert "openssl" not in install


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ({}, "this is not Debian"),
        ({"apt-get": APT_THAT_WORKS, "id": "echo 1000", "sudo": "exit 1"}, "needs root, or sudo without a password"),
        ({"apt-get": "exit 100"}, "lists of Debian's packages could not be read"),
        ({"apt-get": "sleep 50"}, "lists of Debian's packages could not be read"),
        ({"apt-get": 'case "$*" in *install*) sleep 50 ;; esac'}, "could not be downloaded"),
        ({"apt-get": ""}, "the programs are not there"),
    ],
)
def test_where_it_cannot_it_says_so_and_ends(machine: Machine, programs: dict[str, str], reason: str) -> None:
    for program, text in programs.items():
        machine.give(program, text)
    began = time.monotonic()
    done = machine.run()
    assert done.returncode == 1
    assert reason in done.stderr
    assert all(package in done.stderr for package in PACKAGES)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("installed", [True, False])
def test_ci_goes_on_and_lets_no_test_be_skipped_that_could_run(tmp_path: Path, installed: bool) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "install_programs.sh"
    script.write_text(f"#!/bin/sh\nexit {0 if installed else 1}\n")
    script.chmod(0o755)
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1 ${{{PROGRAMS_ENV}-}}"\n')
    make.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != PROGRAMS_ENV}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, check=True)
    word = "installed" if installed else ""
    assert done.stdout.splitlines() == ["setup ", f"check {word}", f"test {word}"]
