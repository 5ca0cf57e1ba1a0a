#!/usr/bin/env python3
"""Other processors than this one. Usage: processors.py CALDERA [--all] [--only NAME...]

Held to less (CALDERA_CPU): for each class of processors up to this machine's, the tests of operations, two steps of both stages in float32 and
bfloat16 whose losses must be this machine's own up to rounding, and two tokens.

Emulated (qemu-x86_64, Debian's package qemu-user): an old processor, one with AVX2, and AMD's before AVX-512: what the program takes it for, the
tests of operations but for the slowest, a step of both stages, and two tokens. QEMU knows no AVX-512. The program must not start again there (as
it does for CALDERA_CPU, and where cores are busy): the second start would not be emulated.

What is not there (a class above this machine's, QEMU) is told and skipped. Three to five minutes; --all emulates every test of base, data, model and
train, which takes hours. --only names classes and processors, e.g. avx2 Haswell."""
import argparse, json, pathlib, platform, re, shutil, subprocess, sys, tempfile, time

from ranks import CLEAN, ROOT
from tiny import make_inputs, write_recipe

CLASSES = ["x86-64-v2", "avx2", "avx512", "avx512_bf16"]  # what CALDERA_CPU may ask for, in ascending order
EMULATED = {"Nehalem": "x86-64-v2", "Haswell": "avx2", "EPYC-Milan": "avx2"}
OPERATIONS = r"model/(\w*ops|matmul|gemm|few_rows|attend_one|product_way|recompute|decoder|nf4|float8|adamw\w*)$"
# Twenty seconds and more where emulated. What is new and slow ends at the limit below, and belongs here.
SLOW = ["Gemm.KeepsLittleMemory", "Gemm.MultipliesDeepFactors", "Ops.LinearCrossEntropyInChunks", "Ops.PackedAttention",
        "Ops.PackedAttentionOfAnyShape", "WidenedProduct.IsRoundedOnceWhateverItsBlocks", "Llama.EachHalfThatRecomputesKeepsWhatItIsSaidTo"]
LIMIT_S = 240  # of one program; of --all's, six hours
ROUNDING = {"float32": 1e-4, "bfloat16": 1e-2}  # relative, of a loss

parser = argparse.ArgumentParser()
parser.add_argument("caldera", type=pathlib.Path)
parser.add_argument("--all", action="store_true")
parser.add_argument("--only", nargs="+", default=[])
options = parser.parse_args()
caldera = options.caldera.resolve()
work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_processors_"))
failed = []


class Failure(Exception):
    pass


def run(command, settings, limit=LIMIT_S):
    try:
        process = subprocess.run(command, cwd=ROOT, env=CLEAN | settings, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 errors="replace")
    except subprocess.TimeoutExpired as expired:
        last = (expired.stdout or b"").decode(errors="replace").strip().splitlines()[-1:]
        raise Failure(f"{' '.join(map(str, command))}: still running after {limit} s: {''.join(last)}")
    # QEMU lists what it lacks of the processor, at each start; LibTorch's errors hold the calls.
    drop = re.compile(r"TCG doesn't support requested feature|^frame #")
    text = "\n".join(line for line in process.stdout.splitlines() if not drop.search(line))
    if process.returncode != 0:
        raise Failure(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{text[-3000:]}")
    return text


def class_of(prefix, settings):
    text = run([*prefix, caldera, "--version"], settings)
    found = re.search(r"^processor: .*?(\S+?)(?: \(held to (\S+) by CALDERA_CPU\))?$", text, re.MULTILINE)
    if not found:
        raise Failure(f"caldera --version names no processor:\n{text}")
    return found[2] or found[1]


def programs_of(pattern):
    """Of the ctests with such names: each program, and the filter that takes those tests' cases."""
    listed = json.loads(run(["ctest", "--test-dir", caldera.parent, "--show-only=json-v1"], {}))
    filters = {}
    for test in listed["tests"]:
        program, *arguments = test["command"]
        if re.search(pattern, test["name"]) and program.endswith("_tests"):
            filters.setdefault(program, []).append(arguments[0].removeprefix("--gtest_filter="))
    return {program: ":".join(parts) for program, parts in filters.items()}


def test(prefix, settings, pattern, but=()):
    failures = []
    for program, cases in programs_of(pattern).items():
        if not pathlib.Path(program).exists():
            raise Failure(f"{program} is not built: scripts/setup.sh --tests")
        began = time.monotonic()
        try:
            text = run([*prefix, program, "--gtest_brief=1", f"--gtest_filter={cases}{'-' + ':'.join(but) if but else ''}"], settings,
                       6 * 3600 if options.all and prefix else LIMIT_S)
        except Failure as failure:
            failures.append(str(failure))
            print(f"  {program}: FAILED, see below", flush=True)
            continue
        print(f"  {program}: {''.join(re.findall(r'PASSED.*?([0-9]+ tests?)', text))} in {time.monotonic() - began:.1f} s", flush=True)
    if failures:
        raise Failure("\n".join(failures))


def train(prefix, settings, name, dtype, steps):
    """The losses of both stages; what they leave answers."""
    stage = {"max_steps": steps, "dtype": dtype, "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0}}
    output = work / f"{name}_{dtype}_{steps}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = write_recipe(work, output, {"pretrain": {"trainable": ["projector"]} | stage,
                                         "finetune": {"trainable": ["projector", "language_model"]} | stage})
    run([*prefix, caldera, "train", recipe], settings)
    run([*prefix, caldera, "generate", "--model", output / "finetune/final", "--image", work / "images/0.bmp", "--prompt", "what is this",
         "--max-new-tokens", "2", "--dtype", dtype], settings)
    return [line["loss"] for stage in ("pretrain", "finetune") for line in map(json.loads, open(output / stage / "metrics.jsonl")) if "loss" in line]


def try_program(prefix, settings, name, dtype, steps):
    losses, own = train(prefix, settings, name, dtype, steps), train([], {}, "own", dtype, steps)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, own, strict=True))
    print(f"  losses in {dtype}: at most {worst:.1e} from this machine's own", flush=True)
    if not worst <= ROUNDING[dtype]:
        raise Failure(f"losses in {dtype} further from each other than rounding explains: {losses}, {own}")


def on(title, check):
    began = time.monotonic()
    print(title, flush=True)
    try:
        check()
        print(f"  passed in {time.monotonic() - began:.0f} s", flush=True)
    except Failure as failure:
        print(f"  FAILED: {failure}", flush=True)
        failed.append(title)


def held(name):
    settings = {"CALDERA_CPU": name}
    if class_of([], settings) != name:
        raise Failure(f"CALDERA_CPU={name} makes it {class_of([], settings)}")
    test([], settings, OPERATIONS)
    for dtype in ROUNDING:
        try_program([], settings, name, dtype, steps=2)


def emulated(name):
    prefix = ["qemu-x86_64", "-cpu", name]
    if class_of(prefix, {}) != EMULATED[name]:
        raise Failure(f"the program takes it for {class_of(prefix, {})}, not {EMULATED[name]}")
    if options.all:
        test(prefix, {}, "^(base|data|model|train)/")
    else:
        test(prefix, {}, OPERATIONS, SLOW)
    for dtype in ROUNDING if options.all else ["bfloat16"]:
        try_program(prefix, {}, name, dtype, steps=1)


try:
    if platform.machine() != "x86_64":
        print(f"skipped: this is {platform.machine()}, not x86_64")
        sys.exit(0)
    machine = class_of([], {})
    print(f"this machine: {machine}")
    make_inputs(work, num_samples=40)
    order = ["x86-64", *CLASSES, "amx"]
    for name in [name for name in CLASSES if not options.only or name in options.only]:
        if order.index(name) > order.index(machine):
            print(f"{name}: skipped: this machine has {machine}")
        else:
            on(f"held to {name}", lambda: held(name))
    for name in [name for name in EMULATED if not options.only or name in options.only]:
        if shutil.which("qemu-x86_64"):
            on(f"emulated {name}", lambda: emulated(name))
        else:
            print(f"{name}: skipped: there is no qemu-x86_64 (Debian: apt-get install qemu-user)")
finally:
    shutil.rmtree(work, ignore_errors=True)
if failed:
    sys.exit(f"FAILED: {', '.join(failed)}")
