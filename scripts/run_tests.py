"""Run the test suites, each in a process of its own, and print their sum in the last line.

They cannot share a process. The V2 runner and the kernels need Triton's interpreter before torch is imported, the V1
runner must not have it, and an engine keeps its memory until its process ends.

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

OWN_SUITES = ("kernels", "engines", "families", "servers", "load", "gpu")
"""Folders of tests/ that the unit suite leaves out. `benchmarks/gpu.sh` runs `gpu`."""

SLOWER_UNIT_TESTS = (
    "api/test_batch_lines.py",
    "api/test_batch_runner.py",
    "benchmarks/test_environments.py",
    "cli/test_doctor.py",
    "derive",
    "engine/test_host_memory.py",
    "evaluate",
    "test_check_vllm.py",
    "test_models.py",
    "test_run_tests.py",
    "test_triton_kernels_name.py",
)
"""Parts of the unit suite that start engines, Ray or processes, or measure memory. The quick suites skip them."""

QUICK_FOLDERS = ("benchmarks", "cli", "demo", "deploy", "vectors")
"""Half of the quick tests, for the second core."""

SHARED_CORES = {"OMP_WAIT_POLICY": "passive"}
"""Threads of engines that share cores must not spin: each step would otherwise take a time slice."""

PARALLEL_SUITES = 2


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A pytest run.

    paths: those under tests/ to run; none = all of tests/. without: paths to leave out. by_default: run it if no suite
    is named. slow: run it with --all only, or if it is named; then with its slow tests, and after the other suites,
    since it measures latencies.
    """

    name: str
    paths: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    by_default: bool = True
    slow: bool = False

    def runs(self, *, with_slow: bool) -> bool:
        """Whether it runs if no suite is named."""
        return self.by_default and (with_slow or not self.slow)

    def command(self, *, with_slow: bool, report: Path) -> list[str]:
        return [
            str(Path(sys.executable).with_name("pytest")),
            "-q",
            "--durations=5",
            f"--junitxml={report}",
            *([] if with_slow or self.slow else ["-m", "not slow"]),
            *([f"tests/{path}" for path in self.paths] or ["tests"]),
            *(f"--ignore=tests/{path}" for path in self.without),
        ]


SUITES = (
    Suite(name="serving", paths=("servers",)),
    Suite(name="unit", without=OWN_SUITES),
    Suite(name="engine-v2", paths=("engines",), env={"STEER_TEST_RUNNER": "v2"}),
    Suite(name="engine-v1", paths=("engines",), env={"STEER_TEST_RUNNER": "v1"}),
    Suite(name="kernels", paths=("kernels",)),
    Suite(name="families", paths=("families",)),
    Suite(name="load", paths=("load",), slow=True),
    Suite(name="quick", without=(*OWN_SUITES, *SLOWER_UNIT_TESTS, *QUICK_FOLDERS), by_default=False),
    Suite(name="quick-folders", paths=QUICK_FOLDERS, without=SLOWER_UNIT_TESTS, by_default=False),
)
"""The longest first. The two quick suites are a part of `unit`."""


def main() -> int:
    arguments = parsed_arguments()
    named = arguments.suites
    chosen = [suite for suite in SUITES if (suite.name in named if named else suite.runs(with_slow=arguments.all))]

    def timed(suite: Suite) -> tuple[Counter[str], str]:
        print(f"{suite.name}: started", flush=True)
        began = time.monotonic()
        counts = run(suite, with_slow=arguments.all)
        numbers = f"{counts['passed']:4} passed {counts['failed']:3} failed {counts['skipped']:3} skipped"
        return counts, f"{suite.name:10} {numbers} {time.monotonic() - began:6.0f} s"

    with ThreadPoolExecutor(max_workers=PARALLEL_SUITES) as pool:
        results = list(pool.map(timed, (suite for suite in chosen if not suite.slow)))
    results += [timed(suite) for suite in chosen if suite.slow]
    total = sum((counts for counts, _ in results), Counter[str]())
    print("", *(line for _, line in results), sep="\n")
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"{total['passed']} passed, {total['failed']} failed{skipped}")
    return 1 if total["failed"] or not total["passed"] else 0


def parsed_arguments() -> argparse.Namespace:
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(description="Run the test suites, each in its own process.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="include the slow tests")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.suites if name not in names]:
        parser.error(f"unknown suite {unknown[0]!r}; valid are {', '.join(names)}")
    return arguments


def run(suite: Suite, *, with_slow: bool) -> Counter[str]:
    """Numbers of passed, failed and skipped tests. A run that breaks without a failed test counts as one failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            suite.command(with_slow=with_slow, report=report),
            cwd=ROOT,
            env=os.environ | SHARED_CORES | suite.env,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        # In one piece: other suites print at the same time.
        print(f"\n==> {suite.name}\n{done.stdout.decode(errors='replace')}", flush=True)
        counts = read_report(report) if report.exists() else Counter[str]()
    if done.returncode != 0 and not counts["failed"]:
        counts["failed"] = 1  # a broken conftest, a crash of the interpreter, or no test at all
    return counts


def read_report(report: Path) -> Counter[str]:
    """Numbers of passed, failed and skipped tests of a JUnit file."""
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        counts["failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"] += 1
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
