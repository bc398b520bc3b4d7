"""Writes the measurements of a run to disk as they arrive, so that an interrupted run can be resumed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from steer_engine.errors import EvaluationError

Key = tuple[str, str, str]
"""Split (or `"neutral"`), key of the condition, id of the question."""


class Journal:
    """A file with one JSON line per measured (question, condition). The first line describes the run.

    facts: everything that the numbers depend on: model, task, settings, versions. A file with other facts is rejected,
        never overwritten.

    Raises:
        EvaluationError: the file belongs to another run, or is not a journal; or a run that has not ended writes it.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._scores: dict[Key, dict[str, float]] = {}
        head = json.dumps({"steer_engine_journal": 1, **facts}, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            self._lock()
            keep = self._read(head)
            self._file.truncate(keep)  # removes an incomplete line of a run that was killed
            if keep == 0:
                self._file.write(head.encode() + b"\n")
                self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._scores)

    def __contains__(self, key: Key) -> bool:
        return key in self._scores

    def __getitem__(self, key: Key) -> dict[str, float]:
        return self._scores[key]

    def add(self, key: Key, score: Mapping[str, float]) -> None:
        """Append one measurement."""
        self._scores[key] = dict(score)
        self._file.write(json.dumps([*key, score]).encode() + b"\n")

    def commit(self) -> None:
        """Flush all added measurements to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        """Take the exclusive right to write. The system releases the lock if the process dies."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"{self._path}: another run is writing this file; wait for it, end it, or choose another --out."
            ) from None
        except OSError:  # a file system without locks
            return

    def _read(self, head: str) -> int:
        """Load the measurements of an earlier run. Returns the length of the complete lines in bytes."""
        keep = 0
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            if number == 1:
                if line.decode(errors="replace").strip() != head:
                    raise EvaluationError(
                        f"{self._path}: contains the numbers of another run (model, task, settings or versions "
                        "differ). Choose another --out, or remove the folder."
                    )
            else:
                try:
                    split, condition, question, score = json.loads(line)
                    self._scores[split, condition, question] = dict(score)
                except (ValueError, TypeError):
                    raise EvaluationError(
                        f"{self._path}:{number}: not a journal line. Remove this line to keep the others (what is "
                        "missing is measured again), or remove the file to measure everything again."
                    ) from None
            keep += len(line)
        return keep
