"""Run everything that needs a GPU, one step after the other, and print one table of verdicts.

A step that is ok is not repeated by the next run with the same results folder and command; AGAIN=1 repeats all steps. A
failed step does not stop the others. Every step has a log, and most have numbers, in the results folder:
benchmarks/results/<GPU>-<MODEL>-<COMMIT>/. Send this folder back.

With --plan, nothing is measured and no GPU is needed: each step's command line is parsed, its tests are collected, and
the kernels are compiled for the named cards.
"""

# Only the standard library: the first step makes the environment in which the others run.

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

MODEL = "smollm2-135m"
QUESTIONS = ("serve", "distinct", "prefix", "when", "language", "admission", "startup", "http")
"""All of `run.py` that compare with plain vLLM."""
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""All that `steer_kernels.compile` knows: A100, H100 and H200, B200, MI300."""
KERNEL_TESTS = ("edit_residual", "add_rms_norm_edit", "probes", "route_rows", "advance_triggers")
"""Files of tests/kernels that launch kernels."""
SERVE_FLAGS = ("--steering-fuse-norm", "--steering-sites", "attn,mlp", "--steering-capture", "all")

V1 = {"STEER_TEST_RUNNER": "v1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
V2 = {"STEER_TEST_RUNNER": "v2", "VLLM_USE_V2_MODEL_RUNNER": "1"}

OK, FAILED, SKIPPED, NOT_RUN = "ok", "failed", "skipped", "not run"
STATE = "steps.json"
TABLE = "verdict.txt"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the table.

    command: what runs, with the variables `env` besides those of this process. planned: what checks it without a GPU.
    gpus: how many it needs. minutes: its time limit. numbers: the file that it writes in the results folder. tests: it
    is a pytest run, in which at least one test must pass, or be collected.
    """

    name: str
    command: tuple[str, ...]
    planned: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    gpus: int = 1
    minutes: float = 60
    numbers: str = ""
    tests: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a step came to. log, numbers: files in the results folder. note: counts of tests, or the reason."""

    step: str
    verdict: str
    seconds: float = 0.0
    log: str = ""
    numbers: str = ""
    note: str = ""
    command: tuple[str, ...] = ()
    finished: str = ""


def steps(model: str, out: Path, python: str, *, again: bool = False) -> list[Step]:
    """All steps, in their order: the environment, correctness, then speed."""
    tool = (str(Path(python).with_name("steer-engine")),)
    parallel = "tests/gpu/test_gpu_parallel.py"
    return [
        Step(
            name="setup",
            command=("make", "EXTRA=cuda", "setup"),
            planned=("make", "--dry-run", "EXTRA=cuda", "setup"),
            gpus=0,
        ),
        Step(name="machine", command=("nvidia-smi", "-q"), planned=("nvidia-smi", "-q"), minutes=1),
        Step(
            name="doctor",
            command=(*tool, "doctor", model, *SERVE_FLAGS),
            planned=(*tool, "doctor", model, "--memory-only", *SERVE_FLAGS),
            minutes=20,
        ),
        _tests(
            "kernel-tests",
            python,
            *(f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS),
            env={"STEER_TEST_KERNELS": "cuda"},
        ),
        _tests("engine-v2", python, "tests/gpu", f"--ignore={parallel}", env=V2),
        _tests("engine-v1", python, "tests/gpu", f"--ignore={parallel}", env=V1),
        _tests("two-gpus-v2", python, parallel, env=V2, gpus=2),
        _tests("two-gpus-v1", python, parallel, env=V1, gpus=2),
        _kernel_speed(python, out),
        *(_question(name, model, out, python, env=V2, again=again) for name in QUESTIONS),
        _question("serve", model, out / "v1", python, env=V1, again=again),
    ]


def _tests(name: str, python: str, *paths: str, env: dict[str, str], gpus: int = 1) -> Step:
    command = (python, "-P", "-m", "pytest", "-q", *paths)
    return Step(
        name=name,
        command=command,
        planned=(*command, "--collect-only"),
        env=env,
        gpus=gpus,
        minutes=90,
        tests=True,
    )


def _kernel_speed(python: str, out: Path) -> Step:
    numbers = "kernels.json"
    command = (python, "-P", "triton_kernels/bench/kernels.py", "--json", str(out / numbers))
    return Step(name="kernel-speed", command=command, planned=(*command, "--plan"), numbers=numbers, minutes=90)


def _question(name: str, model: str, out: Path, python: str, *, env: dict[str, str], again: bool) -> Step:
    # Two engines share the GPU: plain vLLM and Steer Engine.
    flags = ("--model", model, "--dtype", "bfloat16", "--memory", "0.35", "--out", str(out))
    command = (python, "benchmarks/run.py", name, *flags)
    suffix = "-v1" if env == V1 else ""
    return Step(
        name=f"bench-{name}{suffix}",
        command=(*command, "--again") if again else command,
        planned=(*command, "--plan"),
        env=env,
        numbers=f"{'v1/' if suffix else ''}{name}.json",
        minutes=180,
    )


def planned(step: Step) -> Step:
    """The step that checks the command line of `step` and needs no GPU."""
    if step.name == "machine":
        return replace(step, gpus=1)
    return replace(step, command=step.planned, gpus=0, minutes=15, numbers="")


def compiling(target: str, out: Path, python: str) -> Step:
    """The step that compiles all kernels for one card."""
    numbers = f"compiled-{target}.json"
    command = (python, "-P", "triton_kernels/bench/kernels.py", "--target", target, "--json", str(out / numbers))
    return Step(name=f"compile-{target}", command=command, planned=command, gpus=0, minutes=30, numbers=numbers)


class Run:
    """Steps with one results folder. `verdicts` has the saved ones, replaced by the new ones, by step."""

    def __init__(self, out: Path, num_gpus: int, *, again: bool, planning: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.num_gpus, self.again, self.planning = out, num_gpus, again, planning
        self._path = out / STATE
        saved = json.loads(self._path.read_text()) if self._path.exists() and not planning else []
        self.verdicts = {each["step"]: Verdict(**{**each, "command": tuple(each["command"])}) for each in saved}

    def __call__(self, step: Step) -> None:
        """Run a step, or take its saved verdict, or skip it."""
        if (saved := self._finished(step)) is not None:
            print(f"==> {step.name}: {saved.verdict} already ({saved.finished}); AGAIN=1 repeats it", flush=True)
        elif reason := self._reason_to_skip(step):
            self._add(Verdict(step=step.name, verdict=SKIPPED, note=reason))
            print(f"==> {step.name}: skipped, {reason}", flush=True)
        else:
            print(f"==> {step.name}", flush=True)
            verdict = self._run(step)
            self._add(verdict)
            if verdict.verdict == FAILED:
                print(*(f"    {line}" for line in tail(self.out / verdict.log)), sep="\n", flush=True)

    def _finished(self, step: Step) -> Verdict | None:
        saved = self.verdicts.get(step.name)
        done = saved is not None and saved.verdict == OK and saved.command == same(step.command)
        # `make` itself knows what of the environment is missing.
        return saved if done and not self.again and step.name != "setup" else None

    def _reason_to_skip(self, step: Step) -> str:
        if step.gpus > self.num_gpus:
            return "needs a GPU" if step.gpus == 1 else f"needs {step.gpus} GPUs"
        setup = self.verdicts.get("setup")
        if setup is not None and setup.verdict == FAILED and not self.planning:
            return "setup failed"
        return ""

    def _run(self, step: Step) -> Verdict:
        log, began = f"{step.name}.log", time.monotonic()
        status, note = in_own_group(step, self.out / log)
        text = (self.out / log).read_text(errors="replace")
        if step.tests:
            counts = counted(text)
            note = note or counts
            if status == 0 and not re.search(r"[1-9]\d* (passed|tests? collected)", counts):
                status, note = 1, f"no test ran: {counts or 'none was found'}"
        numbers = step.numbers if not status and (self.out / step.numbers).is_file() else ""
        note = note or (targets_of(self.out / numbers) if numbers else "")
        return Verdict(
            step=step.name,
            verdict=FAILED if status else OK,
            seconds=round(time.monotonic() - began, 1),
            log=log,
            numbers=numbers,
            note=note or (f"exit status {status}" if status else ""),
            command=same(step.command),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _add(self, verdict: Verdict) -> None:
        self.verdicts[verdict.step] = verdict
        self._path.write_text(json.dumps([asdict(each) for each in self.verdicts.values()], indent=1) + "\n")


def same(command: Sequence[str]) -> tuple[str, ...]:
    """A command without what only says that a question is repeated."""
    return tuple(word for word in command if word != "--again")


def in_own_group(step: Step, log: Path) -> tuple[int, str]:
    """Run the step's command; its output goes to `log`. Returns the exit status and, after its limit, a note.

    Engines are processes of their own, so all of the step's group ends with it, also when the user interrupts.
    """
    with log.open("wb") as output:
        words = [*(f"{name}={value}" for name, value in step.env.items()), *step.command]
        output.write(f"$ {' '.join(words)}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | step.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, f"{step.command[0]}: {error.strerror}"
        try:
            return process.wait(step.minutes * 60), ""
        except subprocess.TimeoutExpired:
            return 124, f"ended after its limit of {step.minutes} minutes"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def counted(log: str) -> str:
    """pytest's last line of counts, without its time; "" if there is none."""
    words = "passed|failed|errors?|skipped|collected|ran"
    found = re.findall(rf"^=*\s*(.*\b(?:{words})\b.*?) in [\d.]+s", log, re.M)
    return str(found[-1]) if found else ""


def targets_of(numbers: Path) -> str:
    """How many targets the claims of a question have met and missed; "" for other numbers."""
    found = json.loads(numbers.read_text())
    claims = found.get("claims", []) if isinstance(found, dict) else []
    counts = Counter(claim["verdict"] for claim in claims if claim["verdict"])
    return f"targets: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}" if counts else ""


def tail(path: Path, lines: int = 5) -> list[str]:
    return path.read_text(errors="replace").rstrip().splitlines()[-lines:] if path.is_file() else []


def table(verdicts: Sequence[Verdict]) -> str:
    """Step, verdict, seconds, and where its log and numbers are, in aligned columns."""
    rows = [("step", "verdict", "seconds", "log", "numbers", "note")]
    rows += [
        (each.step, each.verdict, f"{each.seconds:,.0f}" if each.log else "-", each.log or "-", each.numbers or "-",
         each.note)
        for each in verdicts
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that programs see."""
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        names = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return []
    names = [name.strip() for name in names if name.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([each for each in visible.split(",") if each])]


def folder_name(gpu: str, model: str) -> str:
    """GPU, model and commit: results of other code or of another model are not taken for finished."""
    commit = subprocess.run(("git", "rev-parse", "--short", "HEAD"), cwd=ROOT, capture_output=True, text=True).stdout
    parts = (gpu, Path(model).name, commit.strip() or "no-commit")
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", default=MODEL,
        help="packaged model, path or Hugging Face id; it must fit twice into the memory of one GPU. "
        "Default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--plan", nargs="*", metavar="TARGET",
        help=f"check without a GPU, and compile for these cards: any of {', '.join(TARGETS)}. Default: all",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps; the table of --plan names them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="another results folder")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.plan or () if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]!r}; valid are {', '.join(TARGETS)}. A model comes before --plan")
    return arguments


def chosen(all_steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    names = [step.name for step in all_steps]
    if unknown := [name for name in only or () if name not in names]:
        raise SystemExit(f"Unknown step {unknown[0]!r}; valid are {', '.join(names)}.")
    return [step for step in all_steps if only is None or step.name in only]


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Returns the exit status: 1 if a step failed, 2 if nothing can run here."""
    arguments = parsed(argv)
    planning, again, gpus = arguments.plan is not None, os.environ.get("AGAIN", "") not in ("", "0"), gpu_names()
    if planning and find_spec("pytest") is None:
        print("The plan runs in the project's environment. Make it first: make setup", file=sys.stderr)
        return 2
    if not planning and not gpus:
        print(
            "nvidia-smi finds no NVIDIA GPU. To check the steps without one: benchmarks/gpu.sh --plan", file=sys.stderr
        )
        return 2
    out = arguments.out or RESULTS / ("plan" if planning else folder_name(gpus[0], arguments.model))
    out = out.resolve()
    # Relative to the project, where they run: saved commands then say nothing about this machine.
    own, there = Path(".venv/bin/python"), out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    python = sys.executable if planning and not (ROOT / own).exists() else str(own)
    todo = steps(arguments.model, there, python, again=again)
    if planning:
        todo = [planned(step) for step in todo]
        todo += [compiling(target, there, python) for target in arguments.plan or TARGETS]
    run = Run(out, len(gpus), again=again, planning=planning)
    # What a job scheduler sends ends the running step and shows the table too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status, now = 0, chosen(todo, arguments.only)
    try:
        for step in now:
            run(step)
    except KeyboardInterrupt:
        later = "starts again" if planning else "goes on with the step that was running"
        print(f"\nInterrupted. The same command {later}.", file=sys.stderr)
        status = 130
    verdicts = [
        run.verdicts.get(step.name, Verdict(step=step.name, verdict=NOT_RUN))
        for step in todo
        if step in now or step.name in run.verdicts
    ]
    (out / TABLE).write_text(table(verdicts))
    print(f"\n{table(verdicts)}\nLogs, numbers and this table ({TABLE}): {out}")
    if failed := [each.step for each in verdicts if each.verdict == FAILED]:
        print(f"Failed: {', '.join(failed)}")
        return status or 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
