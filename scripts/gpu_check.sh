#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: numerics against the CPU, training on both, the benchmark beside transformers, a
# profile. Uses build/caldera as it is (copied from another machine or built here with CALDERA_CUDA=ON).
#
#   scripts/gpu_check.sh [FOLDER]      results go to FOLDER (default output/gpu_check)
#
# The benchmark needs Python with torch and transformers: PYTHON=/path/to/python, default .deps/venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
python=${PYTHON:-.deps/venv/bin/python}
caldera=${CALDERA:-build/caldera}
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
    echo "gpu_check: $name FAILED, see $out/$name.log:" >&2
    tail -n 5 "$out/$name.log" >&2
  fi
}

command -v nvidia-smi > /dev/null || { echo "gpu_check: no NVIDIA driver here (nvidia-smi is missing)" >&2; exit 1; }
nvidia-smi > "$out/nvidia-smi.txt"

data=$out/scenes
[ -e "$data/finetune.json" ] || step data "$caldera" data make-scenes --out "$data" --num-train 600

# A short run of both stages on either device, from the same start and in float32: the losses must be the same to rounding.
train() { # DEVICE DTYPE NUM_STEPS
  "$caldera" train configs/scenes/scenes.yaml --resume never device="$1" output="$out/$1-$2" model.vision_tower=checkpoints/scenes/vision_tower \
    stages.pretrain.data.data_path="$data/pretrain.json" stages.pretrain.data.image_folder="$data/images" \
    stages.pretrain.data.eval_data_path="" stages.finetune.data.data_path="$data/finetune.json" \
    stages.finetune.data.image_folder="$data/images" stages.pretrain.dtype="$2" stages.finetune.dtype="$2" \
    stages.pretrain.max_steps="$3" stages.finetune.max_steps="$3" "${@:4}" --stage pretrain
  "$caldera" train configs/scenes/scenes.yaml device="$1" output="$out/$1-$2" \
    stages.pretrain.data.data_path="$data/pretrain.json" stages.pretrain.data.image_folder="$data/images" \
    stages.pretrain.data.eval_data_path="" stages.finetune.data.data_path="$data/finetune.json" \
    stages.finetune.data.image_folder="$data/images" stages.pretrain.dtype="$2" stages.finetune.dtype="$2" \
    stages.pretrain.max_steps="$3" stages.finetune.max_steps="$3" "${@:4}" --stage finetune
}
step train_cpu train cpu float32 20
step train_cuda train cuda float32 20
step train_cuda_bf16 train cuda bfloat16 20 --profile 10

score() { "$caldera" score --model "$out/cpu-float32/finetune/final" --data "$data/test.json" --images "$data/images" --template v1 --device "$1" --dtype "$2" --out "$out/score-$1-$2.jsonl"; }
step score_cpu score cpu float32
step score_cuda score cuda float32
step score_cuda_bf16 score cuda bfloat16

step numerics "$python" - "$out" << 'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
bad = []


def compare(name, reference, other, bound):
    worst = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(reference, other, strict=True))
    print(f"{name}: worst relative difference {worst:.1e} (bound {bound:.0e})")
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
compare("scores, cuda bfloat16 against cpu", scores("cpu-float32"), scores("cuda-bfloat16"), 5e-2)
sys.exit(f"too far apart: {', '.join(bad)}" if bad else 0)
PYTHON

step bench "$python" scripts/bench/train.py --device cuda --short --rounds 9 --only bfloat16
cp "$out"/cuda-bfloat16/*/profile.txt "$out/" 2> /dev/null || true

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check: FAILED: ${failed[*]}; all of it is in $out" >&2
  exit 1
fi
echo "gpu_check: all done, see $out (numerics.log, bench.log, profile.txt)"
