"""Run the test suites, each in a process of its own, and end with one line that adds them up.

They can't share a process: the V2 runner and the kernels need Triton's interpreter before torch is imported, the V1
runner must not have it, and each engine keeps its memory until its process ends.

    scripts/run_tests.py [--all] [SUITE ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "engine", "families", "serving", "gpu")
"""Not of the unit suite. Tests of `gpu` are run by `benchmarks/gpu.sh`."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A pytest run: its paths under tests/ (none = everything that has no suite of its own) and its environment."""

    name: str
    folder: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def command(self, *, everything: bool, report: Path) -> list[str]:
        chosen = [f"tests/{self.folder}"] if self.folder else ["tests", *(f"--ignore=tests/{name}" for name in FOLDERS)]
        marks = [] if everything else ["-m", "not slow"]
        return [
            str(Path(sys.executable).with_name("pytest")),
            "-q",
            "--durations=5",
            f"--junitxml={report}",
            *marks,
            *chosen,
        ]


SUITES = (
    Suite(name="serving", folder="serving"),
    Suite(name="unit"),
    Suite(name="engine-v2", folder="engine", env={"STEER_TEST_RUNNER": "v2"}),
    Suite(name="engine-v1", folder="engine", env={"STEER_TEST_RUNNER": "v1"}),
    Suite(name="kernels", folder="kernels"),
    Suite(name="families", folder="families"),
)
"""The longest first."""

JOBS = 2
"""Suites at once."""

SHARING = {"OMP_WAIT_POLICY": "passive"}
"""Engines that share cores must not spin while they wait for their threads: each step would take a time slice."""


def run(suite: Suite, *, everything: bool) -> Counter[str]:
    """Counts of passed, failed and skipped tests. A run that broke down without a failed test counts as one failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = suite.command(everything=everything, report=report)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | SHARING | suite.env,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        status = done.returncode
        # In one piece: suites run side by side.
        print(f"\n==> {suite.name}\n{done.stdout.decode(errors='replace')}", flush=True)
        counts = read_report(report) if report.exists() else Counter[str]()
    if status != 0 and not counts["failed"]:
        counts["failed"] = 1  # broken conftest, crash of the interpreter, or no test at all
    return counts


def read_report(report: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        counts["failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the test suites, each in its own process.")
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(suite.name for suite in SUITES)}"
    )
    parser.add_argument("--all", action="store_true", help="the long tests as well")
    arguments = parser.parse_args()
    names = {suite.name for suite in SUITES}
    if unknown := [name for name in arguments.suites if name not in names]:
        parser.error(f"no suite is called {unknown[0]!r}; there are: {', '.join(sorted(names))}")
    chosen = [suite for suite in SUITES if not arguments.suites or suite.name in arguments.suites]

    def timed(suite: Suite) -> tuple[Counter[str], str]:
        print(f"{suite.name}: started", flush=True)
        began = time.monotonic()
        counts = run(suite, everything=arguments.all)
        tallies = f"{counts['passed']:4} passed {counts['failed']:3} failed {counts['skipped']:3} skipped"
        return counts, f"{suite.name:10} {tallies} {time.monotonic() - began:6.0f} s"

    with ThreadPoolExecutor(max_workers=JOBS) as pool:
        results = list(pool.map(timed, chosen))
    total = sum((counts for counts, _ in results), Counter[str]())
    lines = [line for _, line in results]
    print("", *lines, sep="\n")
    print(
        f"{total['passed']} passed, {total['failed']} failed"
        + (f", {total['skipped']} skipped" if total["skipped"] else "")
    )
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
