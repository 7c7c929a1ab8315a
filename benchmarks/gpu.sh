#!/usr/bin/env bash
# Run every benchmark on CUDA, in less than 8 minutes on one large GPU. Results and logs are written to
# benchmarks/results/cuda as soon as a benchmark ends. The most important benchmarks run first; the script names those
# that failed or had no time left. recipes/gpu_check.sh runs every stage of training at 1.5B and 7B.
#
#     benchmarks/gpu.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${1:-benchmarks/results/cuda}
LIMIT=${LIMIT:-470}  # seconds for all benchmarks
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
    { echo "There is no CUDA device: nothing was run."; exit 1; }
mkdir -p "$OUT"

NOT_RUN=()
run() {  # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS)); shift 2
    if [ "$left" -lt 10 ]; then NOT_RUN+=("$name: no time left"); return; fi
    echo "--- $name"
    timeout --kill-after=5 "$((seconds < left ? seconds : left))" "$PYTHON" "$@" > "$OUT/$name.log" 2>&1 ||
        NOT_RUN+=("$name: exit code $?, see $OUT/$name.log")
    grep -v '^{' "$OUT/$name.log" | tail -n 25
}

run inference 100 benchmarks/inference.py --shape 0.5b --shape 7b --variant default --batch-size 1 --batch-size 8 \
    --grid 12 --grid 8 --new-tokens 33 --out "$OUT"
# the next two compile, which can take minutes
run int8 100 benchmarks/inference.py --shape 0.5b --shape 7b --variant default --variant int8 --grid 12 --new-tokens 33 \
    --out "$OUT/int8"
run compiled 100 benchmarks/inference.py --shape 0.5b --variant default --variant compiled --grid 12 --new-tokens 33 \
    --out "$OUT/compiled"
run training 150 benchmarks/training.py --shape 0.5b --projector avg_pool-144 --projector mlp-576 --repeats 1 \
    --num-steps 8 --out "$OUT/training.json"
run feature_cache 60 benchmarks/feature_cache.py --out "$OUT"
run scaling 60 benchmarks/scaling.py --shape 7b --layers 0 --out "$OUT"
run chat 40 benchmarks/chat.py --layers 0 --out "$OUT"
run unused_work 40 benchmarks/unused_work.py --out "$OUT"
run processor 60 benchmarks/processor.py --out "$OUT"
run tests 120 -m pytest -q -m gpu tests

if [ ${#NOT_RUN[@]} -gt 0 ]; then
    printf 'not completed: %s\n' "${NOT_RUN[@]}"
    exit 1
fi
