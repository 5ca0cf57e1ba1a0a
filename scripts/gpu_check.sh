#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: each operation's kernels, training and scores against the CPU, what
# else there is to set (NCCL with one rank, too), a profile, the benchmark beside transformers. Uses the build as it is (made here with CALDERA_CUDA=ON, or copied from
# another machine).
#
#   scripts/gpu_check.sh [FOLDER]      results go to FOLDER (default output/gpu_check)
#
#   BUILD=build                        the folder of caldera and, where they were built, the tests of operations
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
operations() { # PROGRAM FILTER
  local log
  log=$(in_time "$build/$1" --gtest_filter="$2" 2>&1) || { echo "$log"; return 1; }
  echo "$log"
  [[ $log != *SKIPPED* ]]
}
for test in "model_tests Ops.*:*/Ops.*:OpsOnAGpu.*:AdapterOps.*" "train_tests Snapshot.*:*/Snapshots.*"; do
  read -r program filter <<< "$test"
  if [ -x "$build/$program" ]; then
    step "$program" operations "$program" "$filter"
  else
    echo "gpu_check: operations are not tested by themselves: $build/$program is not built (scripts/setup.sh --tests)"
  fi
done

data=$out/scenes
[ -e "$data/finetune.json" ] || step data in_time "$build/caldera" data make-scenes --out "$data" --num-train 600

# A short run of both stages, from the same start: in float32 the losses must be the same to rounding on either device. The
# end of those that evaluate answers some questions, which tries generation too.
train() { # NAME DEVICE DTYPE [OPTIONS]
  local run=$out/$1
  rm -rf "$run"
  in_time "$build/caldera" train configs/scenes/scenes.yaml device="$2" output="$run" \
    stages.pretrain.data.data_path="$data/pretrain.json" stages.pretrain.data.image_folder="$data/images" \
    stages.pretrain.data.eval_data_path="" stages.finetune.data.data_path="$data/finetune.json" \
    stages.finetune.data.image_folder="$data/images" stages.pretrain.dtype="$3" stages.finetune.dtype="$3" \
    stages.pretrain.max_steps=20 stages.finetune.max_steps=20 "${@:4}"
}
evaluated=(evaluation.data_path="$data/test.json" evaluation.image_folder="$data/images" evaluation.max_questions=20)
step train_cpu train cpu-float32 cpu float32 "${evaluated[@]}"
step train_cuda train cuda-float32 cuda float32 "${evaluated[@]}"
step train_cuda_bf16 train cuda-bfloat16 cuda bfloat16 --profile 10 "${evaluated[@]}"
for stage in pretrain finetune; do
  cp "$out/cuda-bfloat16/$stage/profile.txt" "$out/profile-$stage.txt" || failed+=("profile of $stage")
done

# What else there is to set, each beside the run that it should equal. Four at once.
both() { printf 'stages.%s.'"$1"'\n' pretrain finetune; }
variant() { # NAME DEVICE DTYPE SETTINGS...
  local name=$1 failures=${#failed[@]}
  step "train_$name" train "$name" "${@:2}" evaluation=null
  [ ${#failed[@]} -eq "$failures" ]
}
group_of_one() { # STRATEGY PORT [SETTINGS]: through NCCL, as the only rank
  CALDERA_GROUP_OF_ONE=1 RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$2 \
    variant "nccl-$1" cuda float32 distributed.strategy="$1" "${@:3}"
}
mapfile -t recompute < <(both gradient_checkpointing=true)
mapfile -t inputs_on_host < <(both gradient_checkpointing=true; both memory.offload_activations=true)
mapfile -t eight_bit < <(both optimizer.optim=adamw_8bit)
mapfile -t no_masters < <(both optimizer.master_weights=none)
mapfile -t offload < <(both memory.offload_optimizer=true)
mapfile -t saves < <(both save_steps=3; both async_save=true)
mapfile -t float8 < <(both float8=true)
lora='stages.finetune.lora={lora_r: 8}' qlora='stages.finetune.lora={lora_r: 8, load_in_4bit: true}'
run_variants() { # each a command line in one argument; they run in shells of their own
  local command pids=() names=()
  await_first() {
    wait "${pids[0]}" || failed+=("${names[0]}")
    pids=("${pids[@]:1}") names=("${names[@]:1}")
  }
  for command in "$@"; do
    eval "$command" &
    pids+=($!) names+=("${command%% \"*}")
    if [ ${#pids[@]} -ge 4 ]; then await_first; fi
  done
  while [ ${#pids[@]} -gt 0 ]; do await_first; done
}
run_variants \
  'variant recompute cuda float32 "${recompute[@]}"' \
  'variant inputs-on-host cuda float32 "${inputs_on_host[@]}"' \
  'variant 8bit cuda bfloat16 "${eight_bit[@]}"' \
  'variant no-masters cuda bfloat16 "${no_masters[@]}"' \
  'variant offload cuda bfloat16 "${offload[@]}"' \
  'variant saves cuda bfloat16 "${saves[@]}"' \
  'variant float8 cuda bfloat16 "${float8[@]}"' \
  'variant lora-cpu cpu float32 "$lora"' \
  'variant lora cuda float32 "$lora"' \
  'variant qlora-cpu cpu bfloat16 "$qlora"' \
  'variant qlora cuda bfloat16 "$qlora"' \
  'group_of_one ddp 29511' \
  'group_of_one zero1 29512' \
  'group_of_one zero2 29513' \
  'group_of_one zero3 29514 "${recompute[@]}"'

score() { # DEVICE DTYPE
  in_time "$build/caldera" score --model "$out/cpu-float32/finetune/final" --data "$data/test.json" --images "$data/images" \
    --template v1 --device "$1" --dtype "$2" --out "$out/score-$1-$2.jsonl"
}
step score_cpu score cpu float32
step score_cuda score cuda float32
step score_cuda_bf16 score cuda bfloat16

compare() {
  python3 - "$out" << 'PYTHON'
import json, math, pathlib, sys
out = pathlib.Path(sys.argv[1])
bad = []


def compare(name, read, of, like, bound):
    try:
        reference, other = read(like), read(of)
        if len(reference) != len(other) or not reference:
            raise ValueError(f"{len(reference)} against {len(other)} values")
        if not all(map(math.isfinite, reference + other)):
            raise ValueError("not all values are finite")
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{name}: {error}")
        return bad.append(name)
    scale = sum(map(abs, reference)) / len(reference)
    worst = max(abs(a - b) for a, b in zip(reference, other)) / scale
    print(f"{name}: worst difference {worst:.1e} of the mean (bound {bound:.0e})")
    if not worst <= bound:
        bad.append(name)


def losses(folder):
    return [row["loss"] for stage in ("pretrain", "finetune") for row in map(json.loads, open(out / folder / stage / "metrics.jsonl"))
            if "loss" in row]


def scores(name):
    return [row["nll_sum"] for row in map(json.loads, open(out / f"score-{name}.jsonl"))]


for of, like, bound in [("cuda-float32", "cpu-float32", 1e-3), ("cuda-bfloat16", "cpu-float32", 5e-2), ("recompute", "cuda-float32", 1e-4),
                        ("inputs-on-host", "recompute", 1e-4),
                        ("8bit", "cuda-bfloat16", 5e-2), ("no-masters", "cuda-bfloat16", 5e-2), ("offload", "cuda-bfloat16", 5e-2), ("saves", "cuda-bfloat16", 5e-2),
                        ("float8", "cuda-bfloat16", 1e-1), ("lora", "lora-cpu", 1e-3), ("qlora", "qlora-cpu", 5e-2),
                        *[(f"nccl-{strategy}", "cuda-float32", 1e-4) for strategy in ("ddp", "zero1", "zero2", "zero3")]]:
    compare(f"losses, {of} against {like}", losses, of, like, bound)
compare("scores, cuda float32 against cpu", scores, "cuda-float32", "cpu-float32", 1e-3)
# A single sample's may be off by a tenth in bfloat16; their sum is not.
compare("sum of scores, cuda bfloat16 against cpu", lambda name: [sum(scores(name))], "cuda-bfloat16", "cpu-float32", 5e-2)
sys.exit(f"too far apart: {', '.join(bad)}" if bad else 0)
PYTHON
}
step numerics compare
cat "$out/numerics.log"

# Beside transformers, at the shapes of LLaVA-1.5-7B with a few blocks; then all of its 32 blocks.
# Weights with 7 billion numbers are written and read faster where memory serves as a disk.
scratch_in=${TMPDIR:-/tmp}
shared_kb=$(df --output=avail /dev/shm 2> /dev/null | tail -n 1 || echo 0)
if [ -w /dev/shm ] && [ "${shared_kb:-0}" -gt $((60 << 20)) ]; then scratch_in=/dev/shm; fi
scratch=$(mktemp -d -p "$scratch_in")
trap 'rm -rf "$scratch"' EXIT
bench() { in_time env TMPDIR="$scratch" CALDERA="$build/caldera" "$python" scripts/bench/train.py --device cuda "$@"; }
step bench bench --rounds 9 --json "$out/bench.json"
cat "$out/bench.log"
step bench_7b bench --layers 32 --one-by-one --short --rounds 5 --only "llava 2" --json "$out/bench_7b.json" --set \
  '{"optimizer": {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "warmup_ratio": 0, "optim": "adamw_8bit", "master_weights": "none"}}'
cat "$out/bench_7b.log"

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check: FAILED: ${failed[*]}; all of it is in $out" >&2
  exit 1
fi
echo "gpu_check: all done in $SECONDS s, see $out (numerics.log, bench.log, profile-*.txt)"
