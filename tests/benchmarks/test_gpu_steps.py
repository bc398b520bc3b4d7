"""`benchmarks/gpu.sh`: what it runs, that it can be resumed, its table, and its plan on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_steps
import pytest
from gpu_steps import FAILED, OK, QUESTIONS, SKIPPED, V1, V2, Run, Step, Verdict

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, code: str, **fields: object) -> Step:
    command = (sys.executable, "-c", code)
    return Step(name=name, command=command, planned=command, **fields)  # type: ignore[arg-type]


def counting(folder: Path, name: str, *, status: int = 0) -> Step:
    """A step that adds a letter to a file whenever it runs."""
    return script(name, f"open({str(folder / name)!r}, 'a').write('x'); raise SystemExit({status})")


def run_all(out: Path, steps: list[Step], *, gpus: int = 1, again: bool = False) -> dict[str, Verdict]:
    run = Run(out, gpus, again=again, planning=False)
    for step in steps:
        run(step)
    return run.verdicts


def gpu_sh(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable} | env
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_question_and_both_runners_are_run(tmp_path: Path) -> None:
    import run as benchmark

    assert QUESTIONS == benchmark.QUESTIONS
    steps = {step.name: step for step in gpu_steps.steps("some/model", tmp_path, "python")}
    assert [step.env for name, step in steps.items() if name.startswith("engine")] == [V2, V1]
    assert all(steps[f"bench-{name}"].env == V2 for name in QUESTIONS)
    assert steps["bench-serve-v1"].env == V1
    assert {name for name, step in steps.items() if step.gpus == 2} == {"two-gpus-v2", "two-gpus-v1"}
    assert all("some/model" in step.command for name, step in steps.items() if name.startswith(("bench", "doctor")))
    for step in steps.values():
        for word in step.command:
            path = word.removeprefix("--ignore=")
            assert not path.startswith(("tests/", "benchmarks/", "triton_kernels/")) or (ROOT / path).exists(), path


def test_a_finished_step_is_not_repeated_and_a_failed_one_stops_nothing(tmp_path: Path) -> None:
    steps = [counting(tmp_path, "bad", status=3), counting(tmp_path, "good")]
    first = run_all(tmp_path, steps)
    assert [first[name].verdict for name in ("bad", "good")] == [FAILED, OK]
    assert first["bad"].note == "exit status 3"
    second = run_all(tmp_path, steps)
    assert second["good"] == first["good"]
    assert [len((tmp_path / name).read_text()) for name in ("bad", "good")] == [2, 1]
    run_all(tmp_path, steps, again=True)
    assert len((tmp_path / "good").read_text()) == 2
    # Another command is another step, but --again is none.
    run_all(tmp_path, [replace(steps[1], command=(*steps[1].command, "--again"))])
    assert len((tmp_path / "good").read_text()) == 2
    run_all(tmp_path, [replace(steps[1], command=(*steps[1].command, "more"))])
    assert len((tmp_path / "good").read_text()) == 3


def test_what_cannot_run_is_skipped_with_the_reason(tmp_path: Path) -> None:
    two = script("two", "pass", gpus=2)
    assert run_all(tmp_path / "a", [two])["two"] == Verdict(step="two", verdict=SKIPPED, note="needs 2 GPUs")
    assert run_all(tmp_path / "b", [two], gpus=2)["two"].verdict == OK
    verdicts = run_all(tmp_path / "c", [script("setup", "raise SystemExit(1)", gpus=0), script("later", "pass")])
    assert (verdicts["later"].verdict, verdicts["later"].note) == (SKIPPED, "setup failed")


def test_a_step_that_hangs_ends_with_all_its_processes(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    step = replace(script("hangs", code), minutes=0.05)
    verdict = run_all(tmp_path, [step])["hangs"]
    assert verdict.verdict == FAILED
    assert "limit" in verdict.note
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child still runs")


def test_a_run_that_is_stopped_shows_its_table_and_goes_on_later(tmp_path: Path) -> None:
    """By SIGTERM, as a job scheduler does; its step ends with it, and runs again."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "bin" / "make").chmod(0o755)
    command = [sys.executable, gpu_steps.__file__, "--out", str(tmp_path), "--only", "setup", "machine", "--plan"]
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "==> setup\n"
    while not (tmp_path / "setup.log").exists():
        time.sleep(0.05)
    process.terminate()
    shown = process.communicate(timeout=30)[0].splitlines()
    assert [line.split()[:3] for line in shown if "not run" in line] == [
        ["setup", "not", "run"],
        ["machine", "not", "run"],
    ]
    assert process.returncode == 130
    assert not (tmp_path / gpu_steps.STATE).exists()


@pytest.mark.parametrize(
    ("last_line", "verdict", "note"),
    [
        ("3 passed, 1 skipped in 2.31s", OK, "3 passed, 1 skipped"),
        ("===== 3 passed in 64.10s (0:01:04) =====", OK, "3 passed"),
        ("183 tests collected in 0.12s", OK, "183 tests collected"),
        ("4 skipped in 0.50s", FAILED, "no test ran: 4 skipped"),
        ("no tests ran in 0.01s", FAILED, "no test ran: no tests ran"),
        ("nothing", FAILED, "no test ran: none was found"),
    ],
)
def test_a_run_in_which_no_test_passes_has_failed(tmp_path: Path, last_line: str, verdict: str, note: str) -> None:
    found = run_all(tmp_path, [script("tests", f"print('...\\n' + {last_line!r})", tests=True)])["tests"]
    assert (found.verdict, found.note) == (verdict, note)


def test_the_table_says_where_everything_is(tmp_path: Path) -> None:
    step = script("speed", f"open({str(tmp_path / 'speed.json')!r}, 'w').write('[]')", numbers="speed.json")
    steps = [step, script("missing", "raise SystemExit('no such thing')", numbers="missing.json")]
    steps.append(replace(steps[0], name="absent", command=("no-such-program",)))
    verdicts = run_all(tmp_path, steps)
    lines = gpu_steps.table(list(verdicts.values())).splitlines()
    assert lines[0].split() == ["step", "verdict", "seconds", "log", "numbers", "note"]
    assert lines[1].split()[:2] == ["speed", "ok"]
    assert lines[1].split()[3:] == ["speed.log", "speed.json"]
    assert lines[2].split()[3:] == ["missing.log", "-", "exit", "status", "1"]
    assert "no-such-program: No such file" in lines[3]
    assert "no such thing" in (tmp_path / "missing.log").read_text()
    assert [each["step"] for each in json.loads((tmp_path / gpu_steps.STATE).read_text())] == list(verdicts)


def test_the_table_counts_the_targets_of_a_question(tmp_path: Path) -> None:
    claims = [{"verdict": verdict} for verdict in ("met", "missed", "", "met")]
    (tmp_path / "serve.json").write_text(json.dumps({"claims": claims}))
    verdict = run_all(tmp_path, [script("bench-serve", "pass", numbers="serve.json")])["bench-serve"]
    assert verdict.note == "targets: 2 met, 1 missed"


def test_without_a_gpu_it_says_how_to_plan(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = gpu_sh(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "benchmarks/gpu.sh --plan" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"), [(("--plan", "sm_20"), "sm_80, sm_90"), (("--only", "x", "--plan"), "engine-v2")]
)
def test_wrong_words_are_refused_with_the_valid_ones(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = gpu_sh("--out", str(tmp_path), *arguments)
    assert done.returncode != 0
    assert words in done.stderr


def test_the_plan_finds_a_wrong_command_line(tmp_path: Path) -> None:
    """Its own steps parse; a flag that the program does not have does not."""
    fast = ("setup", "bench-when")
    done = gpu_sh("--out", str(tmp_path), "--only", *fast, "--plan", "sm_90")
    assert done.returncode == 0, done.stdout
    saved = {each["step"]: each for each in json.loads((tmp_path / gpu_steps.STATE).read_text())}
    assert {name: each["verdict"] for name, each in saved.items()} == dict.fromkeys(fast, OK)
    assert (tmp_path / gpu_steps.TABLE).read_text() in done.stdout
    steps = {step.name: gpu_steps.planned(step) for step in gpu_steps.steps("smollm2-135m", tmp_path, sys.executable)}
    wrong = replace(steps["bench-when"], command=(*steps["bench-when"].command, "--rounds", "3"))
    assert run_all(tmp_path / "wrong", [wrong])["bench-when"].verdict == FAILED
    assert "--rounds" in (tmp_path / "wrong" / "bench-when.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_plan(tmp_path: Path) -> None:
    """Every command line, every test of tests/gpu, the flags of the servers, and every kernel for every card."""
    done = gpu_sh("--out", str(tmp_path), "--plan")
    saved = {each["step"]: each for each in json.loads((tmp_path / gpu_steps.STATE).read_text())}
    failed = {
        name: (tmp_path / each["log"]).read_text()[-2000:] for name, each in saved.items() if each["verdict"] == FAILED
    }
    assert not failed
    assert done.returncode == 0
    assert [name for name, each in saved.items() if each["verdict"] == SKIPPED] == (
        ["machine"] if not gpu_steps.gpu_names() else []
    )
    assert {f"compile-{target}" for target in gpu_steps.TARGETS} < saved.keys()
