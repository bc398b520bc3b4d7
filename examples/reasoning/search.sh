#!/bin/sh
# Derives a vector as that of this folder on the engine, and tests it on 1,000 other items, against controls and prompts (half an hour
# on two cores). The file of this folder is from a Hugging Face model, so vector and numbers may differ.
# Another seed gives other items, other examples and another vector:  sh examples/reasoning/search.sh 2
set -eu
exec steer-engine search category pick-largest smollm2-135m --recipe shots --recipe labels \
    --blocks 17 --blocks 20 --blocks 26 --alphas 1,2,3 --validation-items 150 --max-model-len 1024 --anyway \
    --seed "${1:-1}" --out "search-seed-${1:-1}"
