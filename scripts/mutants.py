"""Test the tests: break a copy of the code in one place, and check that a named test fails.

    scripts/mutants.py [NAME ...]

Each mutant is a mistake that could stay unnoticed for months: every request gets an answer, some answers are wrong.
The named test must pass on the correct code and fail on the mutant.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str
    file: str
    """Path under steer_engine/, or steer_kernels/... for the kernels."""
    right: str
    wrong: str
    test: str
    """pytest node id under tests/."""
    runner: str = "v1"


MUTANTS = (
    Mutant(
        name="a slot outlives its request",
        file="vllm/runner_v1.py",
        right="slot = self._slot_of.pop(request_id)",
        wrong="slot = self._slot_of[request_id]",
        test="engines/test_admission.py::test_more_requests_than_slots",
    ),
    Mutant(
        name="a generation begins one token late",
        file="edit.py",
        right="(prompt_len if self.from_end else 0)",
        wrong="(prompt_len + 1 if self.from_end else 0)",
        test="engines/test_modes.py::test_steering_changes_between_turns",
    ),
    Mutant(
        name="prefix-cache keys ignore steering",
        file="vllm/scheduler.py",
        right="if key is not None:",
        wrong="if key is None:",
        test="engines/test_prefix_cache.py::test_unequal_steering_does_not_share",
    ),
    Mutant(
        name="prefix-cache keys ignore the site",
        file="edit.py",
        right='content.append(["site", self.site.value])',
        wrong="pass",
        test="test_sites.py::test_each_site_has_its_own_identity",
    ),
    Mutant(
        name="an edit inside a block is computed and lost",
        file="vllm/arming.py",
        right="        op.edit_residual(None, tensor, site)",
        wrong="        op.edit_residual(None, tensor.clone(), site)",
        test="engines/test_site_modules.py::test_an_armed_module_returns_its_output_edited",
    ),
    Mutant(
        name="one rank lacks the vector",
        file="vllm/worker.py",
        right="    adapter.runtime.store.put(vector)",
        wrong=(
            "    from torch.distributed import get_rank\n\n"
            "    if get_rank() == 0:\n        adapter.runtime.store.put(vector)"
        ),
        test="engines/test_tensor_parallel.py",
    ),
    Mutant(
        name="an evicted row is still found",
        file="engine/bank.py",
        right="        row, number = self._idle.popitem(last=False)\n        del self._row_of[row]",
        wrong="        row, number = self._idle.popitem(last=False)",
        test="engine/test_bank.py",
    ),
    Mutant(
        name="edits go into an unused part of the stream",
        file="engine/stream.py",
        right="return StreamForm.HIDDEN_ONLY",
        wrong="return StreamForm.SPLIT",
        test="families/test_families.py::test_parity_at_every_block[stablelm]",
    ),
    Mutant(
        name="a server that stops does not wait for running requests",
        file="vllm/shutdown.py",
        right="while (now := time.monotonic()) - began < at_most:",
        wrong="while (now := time.monotonic()) - began < 0:",
        test="servers/test_while_it_writes.py::test_what_is_under_way_when_the_server_is_told_to_stop_comes_whole",
    ),
    Mutant(
        name="an answer cut off by the shutdown looks complete",
        file="vllm/shutdown.py",
        right="if gate is not None and _is_cut(output)",
        wrong="if gate is None and _is_cut(output)",
        test="servers/test_while_it_writes.py::test_what_is_left_when_the_time_is_up_is_told",
    ),
    Mutant(
        name="edits may grow the stream without bound",
        file="containment.py",
        right="if not bound <= limit:",
        wrong="if bound < 0:",
        test="engines/test_at_the_limits.py::test_what_is_accepted_is_finite_and_leaves_nothing_behind[float32]",
    ),
    Mutant(
        name="norms that a client wrote loosen the bound on growth",
        file="containment.py",
        right="return max(assumed, PEAK_NORMS",
        wrong="return min(assumed, PEAK_NORMS",
        test="test_containment.py::test_the_norms_in_a_file_never_loosen_the_bound",
    ),
    Mutant(
        name="bodies in flight are not counted",
        file="api/gates.py",
        right="self._budget.held += count",
        wrong="self._budget.held += 0",
        test="api/test_middleware.py::test_unfinished_bodies_share_a_budget",
    ),
    Mutant(
        name="numbers that are not finite stay in the KV cache",
        file="vllm/non_finite.py",
        right=".nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)",
        wrong=".clone()",
        test="engines/test_non_finite.py::test_a_request_that_was_aborted_meanwhile",
    ),
    Mutant(
        name="cleaned blocks stay in the prefix cache",
        file="vllm/non_finite.py",
        right="scheduler.kv_cache_manager.evict_blocks(blocks)",
        wrong="scheduler.kv_cache_manager.evict_blocks(set())",
        test="engines/test_non_finite.py::test_cleaned_blocks_leave_the_prefix_cache",
    ),
    Mutant(
        name="a window opens one token late",
        file="steer_kernels/trigger_windows.py",
        right="np.where(open_NJ, opened_NJ + 1, MAX_POSITION)",
        wrong="np.where(open_NJ, opened_NJ + 2, MAX_POSITION)",
        test="engines/test_when.py::test_windows[after]",
    ),
    Mutant(
        name="a rejected draft token leaves its window open",
        file="steer_kernels/trigger_windows.py",
        right="before_NC = history_SHC[slots_N, (pos_N - offset_N - 1) % num_positions]",
        wrong="before_NC = history_SHC[slots_N].max(axis=1)",
        test="engines/test_when_drafts.py::test_windows_follow_accepted_tokens_only",
    ),
    Mutant(
        name="a condition counts what the slot's last owner measured",
        file="engine/programs.py",
        right="        _write(self._tables.measured_SQ[slot, : len(start_Q)], np.array(start_Q))",
        wrong="        pass",
        test="engines/test_when.py::test_conditions",
    ),
    Mutant(
        name="a schedule counts from the first token of the prompt",
        file="steer_kernels/shares.py",
        right="        since_NE = (pos_N1 - first_positions(words_NEW, windows_NJ)).clamp(min=0)",
        wrong="        since_NE = (pos_N1 - 0 * first_positions(words_NEW, windows_NJ)).clamp(min=0)",
        test="engines/test_when.py::test_schedules",
    ),
    Mutant(
        name="prefix-cache keys ignore triggers",
        file="program.py",
        right="parts = [(start, end)] if self.trigger < 0 else windows[self.trigger].within(start, end)",
        wrong="parts = [(start, end)] if self.trigger < 0 else []",
        test="engines/test_prefix_cache.py::test_blocks_before_a_trigger_are_plain_and_those_in_its_window_are_not",
    ),
    Mutant(
        name="the last sampled token counts as steered",
        file="applied.py",
        right="num_computed = prompt_len + max(0, len(tokens) - 1)",
        wrong="num_computed = prompt_len + len(tokens)",
        test="test_applied.py::test_counts_are_those_of_the_definitions",
    ),
    Mutant(
        name="the vector of a preset's condition may be deleted",
        file="vectors/manifest.py",
        right="(*edits, *gates, *whens, *listed)",
        wrong="(*edits, *gates)",
        test="vectors/test_uploaded.py::test_a_vector_of_a_condition_is_in_use",
    ),
    Mutant(
        name="a monitor counts tokens that nobody gets",
        file="vllm/probed.py",
        right="count([numbers_NM[: len(output.new_token_ids)] for output, numbers_NM in watched])",
        wrong="count([numbers_NM for output, numbers_NM in watched])",
        test="engines/test_monitors.py::test_drafts_and_asynchronous_scheduling",
    ),
    Mutant(
        name="a monitor measures after the edits",
        file="monitor.py",
        right="return (*entries[:early], *ours, *entries[early:])",
        wrong="return (*entries, *ours)",
        test="test_monitor.py",
    ),
    Mutant(
        name="an inline vector has the calibration of another request",
        file="api/frontend.py",
        right="return inline[name] if name in inline else self.found(name)",
        wrong="return self.found(name)",
        test="api/test_inline_calibration.py",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name (default: all mutants)")
    names = parser.parse_args().names
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    console = Console()
    survivors = 0
    for mutant in chosen:
        with console.status(f"{mutant.name}: {mutant.test}"), copied_code() as copy:
            correct_passes = passes(mutant, copy)
            apply(mutant, copy)
            caught = correct_passes and not passes(mutant, copy)
        survivors += not caught
        missed = "[red]SURVIVED[/]" if correct_passes else "[red]its test fails on the correct code[/]"
        verdict = "[green]caught[/]" if caught else missed
        console.print(f"{verdict}  {mutant.name}  [dim]{mutant.test}[/]")
    console.print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors or not chosen else 0


@contextmanager
def copied_code() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "steer_engine", copy / "code" / "steer_engine", ignore=ignored)
        shutil.copytree(ROOT / "triton_kernels" / "steer_kernels", copy / "code" / "steer_kernels", ignore=ignored)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        yield copy


def source_of(mutant: Mutant) -> str:
    """The path of a mutant's file under the folder that holds both packages."""
    return mutant.file if mutant.file.startswith("steer_kernels/") else f"steer_engine/{mutant.file}"


def apply(mutant: Mutant, copy: Path) -> None:
    file = copy / "code" / source_of(mutant)
    text = file.read_text()
    assert mutant.right in text, f"{mutant.file} no longer contains {mutant.right!r}: update the mutant"
    file.write_text(text.replace(mutant.right, mutant.wrong))


def passes(mutant: Mutant, copy: Path) -> bool:
    """Whether the mutant's test passes on the copy. Raises SystemExit if pytest cannot run it."""
    environment = {
        **os.environ,
        # The copy comes before the installed package on the path.
        "PYTHONPATH": str(copy / "code"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "STEER_TEST_RUNNER": mutant.runner,
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", f"tests/{mutant.test}"]
    done = subprocess.run(
        command, cwd=copy, env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
