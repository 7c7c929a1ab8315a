#!/usr/bin/env bash
# Every stage of training at real shapes with random weights, a few steps each, on one GPU: throughput, memory and
# environment go to benchmarks/results/gpu_check.json. Under 8 minutes on one large GPU; what could not run is said.
#
#     recipes/gpu_check.sh [--shape 1.5b --shape 7b] [--out DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$PYTHON" recipes/gpu_check.py check "$@"
