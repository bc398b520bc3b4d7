"""The documentation lists the architectures that the tests run, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "architectures.py"


def test_the_table_of_the_docs_is_what_the_tests_say() -> None:
    done = subprocess.run([sys.executable, "-P", str(SCRIPT), "--check"], check=False, timeout=60)
    assert done.returncode == 0, "write it anew: .venv/bin/python -P scripts/architectures.py"
