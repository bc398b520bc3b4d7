"""`steer-engine dump`, the whole command, killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.derivation import varied
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.dump_fitter import DumpFitter
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.errors import DerivationError

SCRIPT = Path(sys.executable).with_name("steer-engine")


def write_pairs(path: Path, count: int) -> Path:
    lines = [{"positive": pair.positive, "negative": pair.negative} for pair in varied(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_bad_lines_are_named_before_an_engine_starts(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3)
    pairs.write_text(pairs.read_text() + '{"positive": "a"}\n')
    with pytest.raises(DerivationError, match=r"pairs\.jsonl:4: the key 'negative' is missing"):
        CliRunner().invoke(
            app, ["dump", "org/none", "--pairs", str(pairs), "--out", str(tmp_path / "d")], catch_exceptions=False
        )


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["dump", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "steer-engine dump smollm2-135m --pairs sentiment" in result.output


def num_texts(folder: Path) -> int:
    return sum(index.read_bytes().count(b"\n") - 1 for index in folder.glob("shard-*.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_kills_leave_the_dump_of_an_undisturbed_run(tiny_llama: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 600)
    # Rows of all tokens at three blocks: each chunk of 32 pairs fills a shard of 1 MiB.
    arguments = [tiny_llama, "--pairs", str(pairs), "--position", "all", "--shard-mib", "1"]
    arguments += ["--dtype", "float32", "--max-model-len", "512"]
    killed = tmp_path / "killed"
    seen = []
    for _ in range(5):
        before = num_texts(killed)
        with (tmp_path / "log").open("w") as log:
            command = [SCRIPT, "dump", *arguments, "--out", str(killed)]
            process = subprocess.Popen(command, stderr=log, start_new_session=True)
        while num_texts(killed) == before and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, f"it ended before it could be killed: {(tmp_path / 'log').read_text()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        seen.append(num_texts(killed))
    assert 0 < seen[0] < seen[1] < seen[2] < seen[3] < seen[4] < 1200
    for folder in (killed, tmp_path / "undisturbed"):
        subprocess.run([SCRIPT, "dump", *arguments, "--out", str(folder)], check=True, timeout=600)
    dumps = [DumpFolder.open(killed), DumpFolder.open(tmp_path / "undisturbed")]
    ids = [[entry.id for shard in dump.require_complete() for entry in shard.entries] for dump in dumps]
    assert ids[0] == ids[1]
    assert len(ids[0]) == len(set(ids[0])) == 1200
    for method in ("diffmean", "pca"):
        fits = [DumpFitter(str(dump.path)).fit(1, method).direction_D.tobytes() for dump in dumps]
        assert fits[0] == fits[1]
