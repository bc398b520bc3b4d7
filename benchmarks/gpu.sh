#!/usr/bin/env bash
# Runs everything that needs a GPU: tests with real CUDA graphs and the real V2 runner, kernel speed, serving ratios.
#   benchmarks/gpu.sh [MODEL]        default: smollm2-135m; any Hugging Face id; the model must fit twice into the memory of one GPU
# Results and logs: benchmarks/results/<GPU>-<date>/. Failed steps are reported at the end; the other steps still run.
set -uo pipefail
cd "$(dirname "$0")/.."
model=${1:-smollm2-135m}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr -c 'A-Za-z0-9\n' '-')
[ -n "$name" ] || { echo "No NVIDIA GPU is visible (nvidia-smi failed)." >&2; exit 2; }
out=benchmarks/results/$name-$(date -u +%Y-%m-%d)
mkdir -p "$out"
failed=()

step() {
    local title=$1
    shift
    echo "==> $title"
    if ! "$@" >"$out/$title.log" 2>&1; then
        failed+=("$title")
        tail -5 "$out/$title.log"
    fi
}

step setup make EXTRA=cuda setup
nvidia-smi >"$out/nvidia-smi.txt"
step tests-gpu .venv/bin/pytest -q tests/gpu
step kernels .venv/bin/python -P triton_kernels/bench/kernels.py --json "$out/kernels.json"
# Two engines share the GPU: plain vLLM and Steer Engine.
step bench .venv/bin/python benchmarks/run.py serve distinct prefix admission startup http \
    --model "$model" --dtype bfloat16 --memory 0.35 --out "$out"

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "Failed: ${failed[*]}. Logs in $out" >&2
    exit 1
fi
echo "All done. Results in $out"
