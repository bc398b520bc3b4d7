"""The documentation lists the architectures that the tests run, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "architectures.py"


def test_the_table_in_the_documentation_is_current() -> None:
    done = subprocess.run([sys.executable, "-P", str(SCRIPT), "--check"], check=False, timeout=60)
    assert done.returncode == 0, "update it: .venv/bin/python -P scripts/architectures.py"
