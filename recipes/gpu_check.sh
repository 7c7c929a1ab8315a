#!/usr/bin/env bash
# Run every stage of training at real shapes with random weights, a few steps each, on one GPU. Throughput, memory and
# the environment are written to benchmarks/results/gpu_check.json. It takes less than 8 minutes on one large GPU, and
# reports what it could not run. It is benchmarks/training.py without the comparison.
#
#     recipes/gpu_check.sh [--shape 1.5b --shape 7b] [--out FILE.json]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[[ " $* " == *" --shape "* ]] || set -- --shape 1.5b --shape 7b "$@"
exec "$PYTHON" benchmarks/training.py --projector avg_pool-144 --repeats 1 --num-steps 6 \
    --out benchmarks/results/gpu_check.json "$@"
