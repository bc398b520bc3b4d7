"""`make test` counts correctly: a crash, a broken conftest or a suite without tests is a failure."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import run_tests

SUITES = run_tests.SUITES
"""The real ones, before a test replaces them."""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs in an empty project with one suite `engine` that sets STEER_TEST_RUNNER=v2."""
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    suite = run_tests.Suite(name="engine", paths=("engine",), env={"STEER_TEST_RUNNER": "v2"})
    monkeypatch.setattr(run_tests, "SUITES", (suite,))
    monkeypatch.setattr(sys, "argv", ["run_tests.py"])
    (tmp_path / "tests" / "engine").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")


CASES = {
    "passed": ("def test_it(): pass", Counter(passed=1)),
    "failed": ("def test_it(): assert 0\ndef test_that(): pass", Counter(passed=1, failed=1)),
    "skipped": ("import pytest\n@pytest.mark.skip\ndef test_it(): pass", Counter(skipped=1)),
    "fixture": ("import pytest\n@pytest.fixture\ndef f(): 1/0\ndef test_it(f): pass", Counter(failed=1)),
    "environment": (
        "import os\ndef test_it(): assert os.environ['STEER_TEST_RUNNER'] == 'v2'",
        Counter(passed=1),
    ),
    "slow test left out": (
        "import pytest\n@pytest.mark.slow\ndef test_it(): assert 0\ndef test_that(): pass",
        Counter(passed=1),
    ),
    "import error": ("import no_such_module", Counter(failed=1)),
    "no test": ("", Counter(failed=1)),
    "crash": ("import os\ndef test_it(): os.abort()", Counter(failed=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_counts(tmp_path: Path, case: str) -> None:
    text, expected = CASES[case]
    (tmp_path / "tests" / "engine" / "test_case.py").write_text(text)
    assert run_tests.run(run_tests.SUITES[0], with_slow=False).counts == expected


def test_last_line_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = tmp_path / "tests" / "engine" / "test_case.py"
    test.write_text(CASES["passed"][0])
    assert run_tests.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"
    test.write_text(CASES["failed"][0])
    assert run_tests.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed"


SKIPS = """
import pytest

@pytest.mark.skipif(True, reason="needs Chromium")
def test_page(): pass

@pytest.mark.skipif(True, reason="nginx or openssl is not installed (Debian: nginx-light, openssl)")
class TestProxy:
    def test_one(self): pass
    def test_two(self): pass

@pytest.mark.skip(reason="only root can do this")
def test_root(): pass

def test_it(): pass
"""


@pytest.fixture
def without_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose tests miss programs; whatever CI has set here does not count."""
    monkeypatch.delenv(run_tests.PROGRAMS_ENV, raising=False)
    (tmp_path / "tests" / "engine" / "test_case.py").write_text(SKIPS)


@pytest.mark.usefixtures("without_programs")
def test_the_last_lines_say_what_was_skipped_and_what_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tests.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("Skipped:") :] == [
        "Skipped:",
        "   1  needs Chromium",
        "   2  nginx or openssl is not installed (Debian: nginx-light, openssl)",
        "   1  only root can do this",
        "Those that miss a program run with:",
        "    make programs && .venv/bin/pytest -m 'not slow' tests/engine/test_case.py",
        "1 passed, 0 failed, 4 skipped",
    ]


@pytest.mark.usefixtures("without_programs")
def test_a_skip_for_a_program_that_ci_installed_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(run_tests.PROGRAMS_ENV, "installed")
    assert run_tests.main() == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "The programs were installed, so these 3 tests should have run: they count as failed.",
        "1 passed, 3 failed, 1 skipped",
    ]


@pytest.mark.parametrize("program", run_tests.PROGRAMS)
def test_every_program_has_a_test_that_needs_it_and_names_it(program: str) -> None:
    """Otherwise the command of the last lines would leave tests out, and CI would accept their skips."""
    tests = Path(__file__).parent
    files = [path for folder in ("api", "deploy", "helpers", "servers") for path in tests.glob(f"{folder}/*.py")]
    text = "".join(path.read_text() for path in files)
    assert re.search(rf'which\("{program}"', text), "nothing looks for it"
    reasons = re.findall(r'(?:reason=|WHY_MISSING = )"([^"]+)"', text)
    assert [reason for reason in reasons if program in reason.lower()]


def test_a_slow_suite_runs_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests" / "load").mkdir()
    slow_test = "import pytest\n@pytest.mark.slow\ndef test_it(): pass"
    (tmp_path / "tests" / "load" / "test_load.py").write_text(slow_test)
    (tmp_path / "tests" / "engine" / "test_case.py").write_text(CASES["passed"][0])
    suites = (run_tests.Suite(name="load", paths=("load",), slow=True), *run_tests.SUITES)
    monkeypatch.setattr(run_tests, "SUITES", suites)
    ran = {}
    for arguments in ((), ("--all",), ("load",)):
        monkeypatch.setattr(sys, "argv", ["run_tests.py", *arguments])
        assert run_tests.main() == 0
        ran[arguments] = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": started")]
    both = ["engine: started", "load: started"]
    assert ran == {(): both[:1], ("--all",): both, ("load",): both[1:]}


def test_the_paths_of_all_suites_exist() -> None:
    """A renamed folder would otherwise run in two suites, or in none."""
    tests = Path(__file__).parent
    paths = {path for suite in SUITES for path in (*suite.paths, *suite.without)}
    assert [path for path in paths if not (tests / path).exists()] == []


def test_every_test_file_is_in_one_default_suite() -> None:
    (rest,) = [suite for suite in SUITES if suite.by_default and not suite.paths]
    own = {path for suite in SUITES if suite.by_default for path in suite.paths}
    assert set(rest.without) == own | {"gpu"}
