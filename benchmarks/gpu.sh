#!/usr/bin/env bash
# Runs everything that needs a GPU, step by step, and prints one table of verdicts; --help says how. CONTRIBUTING.md, "You have a GPU".
#   benchmarks/gpu.sh [MODEL]                  a finished step is not repeated; AGAIN=1 repeats all
#   benchmarks/gpu.sh [MODEL] --plan [sm_90]   without a GPU: check every command line, and compile every kernel for the card
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is required; set its path: PYTHON=python3.11 benchmarks/gpu.sh" >&2
    exit 2
}
exec "$python" benchmarks/gpu_steps.py "$@"
