#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: each operation's kernels, training and scores against the CPU, a
# profile, the benchmark beside transformers. Uses the build as it is (made here with CALDERA_CUDA=ON, or copied from
# another machine).
#
#   scripts/gpu_check.sh [FOLDER]      results go to FOLDER (default output/gpu_check)
#
#   BUILD=build                        the folder of caldera and, where it was built, model_ops_test
#   PYTHON=/path/to/python             for the benchmark: with torch and transformers (default .deps/venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
build=$(realpath -m "${BUILD:-build}")
python=${PYTHON:-.deps/venv/bin/python}
limit_s=600
mkdir -p "$out"
failed=()

# step NAME COMMAND...: its output goes to FOLDER/NAME.log; a failure is told and the rest goes on.
step() {
  local name=$1 start=$SECONDS
  shift
  echo "gpu_check: $name"
  if "$@" > "$out/$name.log" 2>&1; then
    echo "gpu_check: $name: done in $((SECONDS - start)) s"
  else
    failed+=("$name")
    echo "gpu_check: $name FAILED after $((SECONDS - start)) s, see $out/$name.log:" >&2
    tail -n 5 "$out/$name.log" >&2
  fi
}

# in_time COMMAND...: stops it when the ten minutes are over.
in_time() {
  local left=$((limit_s - SECONDS))
  if [ "$left" -le 0 ]; then
    echo "not run: the $limit_s s are over" >&2
    return 1
  fi
  timeout --kill-after=5 "$left" "$@"
}

command -v nvidia-smi > /dev/null || { echo "gpu_check: no NVIDIA driver here (nvidia-smi is missing)" >&2; exit 1; }
nvidia-smi > "$out/nvidia-smi.txt"
[ -x "$build/caldera" ] || { echo "gpu_check: $build/caldera is not built: CALDERA_CUDA=ON scripts/setup.sh --tests" >&2; exit 1; }

# Each operation on the GPU against double precision. A test that is skipped means that no GPU was seen.
operations() {
  local log
  log=$(in_time "$build/model_ops_test" 2>&1) || { echo "$log"; return 1; }
  echo "$log"
  [[ $log != *SKIPPED* ]]
}
if [ -x "$build/model_ops_test" ]; then
  step operations operations
else
  echo "gpu_check: operations are not tested by themselves: $build/model_ops_test is not built (scripts/setup.sh --tests)"
fi

data=$out/scenes
[ -e "$data/finetune.json" ] || step data in_time "$build/caldera" data make-scenes --out "$data" --num-train 600

# A short run of both stages on either device, from the same start: in float32 the losses must be the same to rounding.
# Its end answers some questions, which tries generation too.
train() { # DEVICE DTYPE [OPTIONS]
  local run=$out/$1-$2
  rm -rf "$run"
  in_time "$build/caldera" train configs/scenes/scenes.yaml device="$1" output="$run" \
    stages.pretrain.data.data_path="$data/pretrain.json" stages.pretrain.data.image_folder="$data/images" \
    stages.pretrain.data.eval_data_path="" stages.finetune.data.data_path="$data/finetune.json" \
    stages.finetune.data.image_folder="$data/images" stages.pretrain.dtype="$2" stages.finetune.dtype="$2" \
    stages.pretrain.max_steps=20 stages.finetune.max_steps=20 evaluation.data_path="$data/test.json" \
    evaluation.image_folder="$data/images" evaluation.max_questions=20 "${@:3}"
}
step train_cpu train cpu float32
step train_cuda train cuda float32
step train_cuda_bf16 train cuda bfloat16 --profile 10
for stage in pretrain finetune; do
  cp "$out/cuda-bfloat16/$stage/profile.txt" "$out/profile-$stage.txt" || failed+=("profile of $stage")
done

score() { # DEVICE DTYPE
  in_time "$build/caldera" score --model "$out/cpu-float32/finetune/final" --data "$data/test.json" --images "$data/images" \
    --template v1 --device "$1" --dtype "$2" --out "$out/score-$1-$2.jsonl"
}
step score_cpu score cpu float32
step score_cuda score cuda float32
step score_cuda_bf16 score cuda bfloat16

compare() {
  python3 - "$out" << 'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
bad = []


def compare(name, reference, other, bound):
    if len(reference) != len(other) or not reference:
        sys.exit(f"{name}: {len(reference)} against {len(other)} values")
    scale = sum(map(abs, reference)) / len(reference)
    worst = max(abs(a - b) for a, b in zip(reference, other)) / scale
    print(f"{name}: worst difference {worst:.1e} of the mean (bound {bound:.0e})")
    if not worst <= bound:
        bad.append(name)


def losses(folder, stage):
    return [row["loss"] for row in map(json.loads, open(out / folder / stage / "metrics.jsonl")) if "loss" in row]


def scores(name):
    return [row["nll_sum"] for row in map(json.loads, open(out / f"score-{name}.jsonl"))]


for stage in ("pretrain", "finetune"):
    compare(f"losses of {stage}, cuda float32 against cpu", losses("cpu-float32", stage), losses("cuda-float32", stage), 1e-3)
    compare(f"losses of {stage}, cuda bfloat16 against cpu", losses("cpu-float32", stage), losses("cuda-bfloat16", stage), 5e-2)
compare("scores, cuda float32 against cpu", scores("cpu-float32"), scores("cuda-float32"), 1e-3)
# A single sample's may be off by a tenth in bfloat16; their sum is not.
compare("sum of scores, cuda bfloat16 against cpu", [sum(scores("cpu-float32"))], [sum(scores("cuda-bfloat16"))], 5e-2)
sys.exit(f"too far apart: {', '.join(bad)}" if bad else 0)
PYTHON
}
step numerics compare
cat "$out/numerics.log"

step bench in_time env CALDERA="$build/caldera" "$python" scripts/bench/train.py --device cuda --short --rounds 9 --only bfloat16

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check: FAILED: ${failed[*]}; all of it is in $out" >&2
  exit 1
fi
echo "gpu_check: all done in $SECONDS s, see $out (numerics.log, bench.log, profile-*.txt)"
