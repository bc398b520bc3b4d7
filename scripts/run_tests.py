"""Run the test suites, each in a process of its own, and print their sum in the last line.

They cannot share a process. The V2 runner and the kernels need Triton's interpreter before torch is imported, the V1
runner must not have it, and an engine keeps its memory until its process ends.

    scripts/run_tests.py [--all] [SUITE ...]
"""

from __future__ import annotations

import argparse
import os
import re
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

PROGRAMS = ("chromium", "nginx", "node", "openssl", "prometheus", "promtool")
"""Programs that tests drive and no Python package has. The reason of a skip names the one that is missing."""

PROGRAMS_ENV = "STEER_TEST_PROGRAMS"
"""`installed`, as `.ci/run` sets it where it could install them: a test that misses one has failed."""


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
            *(sys.executable, "-P", "-m", "pytest"),
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


@dataclass(frozen=True, kw_only=True, order=True)
class Skip:
    """A skipped test: why, and its file relative to the project."""

    reason: str
    file: str

    @property
    def misses_a_program(self) -> bool:
        return bool(set(re.findall(r"[a-z]+", self.reason.lower())) & set(PROGRAMS))


@dataclass(kw_only=True)
class Outcome:
    """What a suite came to: numbers of passed, failed and skipped tests, and each skipped one."""

    counts: Counter[str] = field(default_factory=Counter)
    skips: list[Skip] = field(default_factory=list)


def main() -> int:
    arguments = parsed_arguments()
    named = arguments.suites
    chosen = [suite for suite in SUITES if (suite.name in named if named else suite.runs(with_slow=arguments.all))]

    def timed(suite: Suite) -> tuple[Outcome, str]:
        print(f"{suite.name}: started", flush=True)
        began = time.monotonic()
        outcome = run(suite, with_slow=arguments.all)
        counts = outcome.counts
        numbers = f"{counts['passed']:4} passed {counts['failed']:3} failed {counts['skipped']:3} skipped"
        return outcome, f"{suite.name:10} {numbers} {time.monotonic() - began:6.0f} s"

    with ThreadPoolExecutor(max_workers=PARALLEL_SUITES) as pool:
        results = list(pool.map(timed, (suite for suite in chosen if not suite.slow)))
    results += [timed(suite) for suite in chosen if suite.slow]
    total = sum((outcome.counts for outcome, _ in results), Counter[str]())
    skips = sorted(skip for outcome, _ in results for skip in outcome.skips)
    print("", *(line for _, line in results), sep="\n")
    print(*skip_lines(skips, with_slow=arguments.all), sep="\n", end="")
    missed = 0
    if os.environ.get(PROGRAMS_ENV) == "installed" and (missed := sum(skip.misses_a_program for skip in skips)):
        print(f"The programs were installed, so these {missed} tests should have run: they count as failed.")
        total.update(failed=missed, skipped=-missed)
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"{total['passed']} passed, {total['failed']} failed{skipped}")
    return 1 if total["failed"] or not total["passed"] else 0


def skip_lines(skips: list[Skip], *, with_slow: bool) -> list[str]:
    """What was skipped and why, and the command that runs what misses a program."""
    if not skips:
        return []
    lines = ["", "Skipped:"]
    lines += [f"{count:4}  {reason}" for reason, count in Counter(skip.reason for skip in skips).items()]
    if files := sorted({skip.file for skip in skips if skip.misses_a_program}):
        chosen = "" if with_slow else "-m 'not slow' "
        lines += [
            "Those that miss a program run with:",
            f"    make programs && .venv/bin/pytest {chosen}{' '.join(files)}",
        ]
    return [*lines, ""]


def parsed_arguments() -> argparse.Namespace:
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(description="Run the test suites, each in its own process.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="include the slow tests")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.suites if name not in names]:
        parser.error(f"unknown suite {unknown[0]!r}; valid are {', '.join(names)}")
    return arguments


def run(suite: Suite, *, with_slow: bool) -> Outcome:
    """Run a suite. A run that breaks without a failed test counts as one failure."""
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
        outcome = read_report(report) if report.exists() else Outcome()
    if done.returncode != 0 and not outcome.counts["failed"]:
        outcome.counts["failed"] = 1  # a broken conftest, a crash of the interpreter, or no test at all
    return outcome


def read_report(report: Path) -> Outcome:
    """The outcome in a JUnit file."""
    outcome = Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        children = {child.tag: child for child in case}
        if "failure" in children or "error" in children:
            outcome.counts["failed"] += 1
        elif "skipped" in children:
            outcome.counts["skipped"] += 1
            reason = children["skipped"].get("message", "no reason given")
            outcome.skips.append(Skip(reason=reason, file=file_of(case.get("classname") or case.get("name", ""))))
        else:
            outcome.counts["passed"] += 1
    return outcome


def file_of(classname: str) -> str:
    """`tests/deploy/test_proxy.py` for pytest's `tests.deploy.test_proxy`, which may end with a class."""
    parts = classname.split(".")
    while len(parts) > 1 and not parts[-1].startswith("test_"):
        parts.pop()
    return "/".join(parts) + ".py"


if __name__ == "__main__":
    raise SystemExit(main())
