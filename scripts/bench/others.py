#!/usr/bin/env python3
"""Everything but the training step: generation, picture loading, tokenising, start-up, checkpoints.

  others.py [--short] [--threads N] [--prefix "nice -n -15 taskset -c 1"] [--only generate|load|tokenize|startup|checkpoint]"""
import argparse, json, os, pathlib, shlex, shutil, statistics, subprocess, sys, tempfile, time

import fixtures, pair

HERE = pathlib.Path(__file__).parent


def generate(work, args):
    """64 greedy tokens after a prompt with a picture; prefill counts."""
    fixtures.make_batch(work, "llava", "v1")
    prompt = "red circle left blue star"
    record = {"id": "p", "image": "llava0.png", "conversations": [{"from": "human", "value": "<image>\n" + prompt}, {"from": "gpt", "value": "x"}]}
    row = fixtures.preview(work, [record], "v1")[0]
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    (work / "prompt.json").write_text(json.dumps(row["ids"][:first]))
    prefix, env = shlex.split(args.prefix), {"OMP_NUM_THREADS": str(args.threads)}
    for dtype in ("float32", "bfloat16"):
        contenders = [pair.Contender("transformers", [sys.executable, HERE / "generate_hf.py", work, dtype, 64, args.threads],
                                     {**env, **pair.TUNED_MALLOC}, prefix)]
        for name in [dtype] + (["int8"] if dtype == "bfloat16" else []):
            contenders.append(pair.Contender(f"Caldera {name}", [fixtures.CALDERA, "bench", "generate", "--model", work / "model", "--template", "v1",
                                             "--dtype", name, "--device", "cpu", "--image", work / "images/llava0.png", "--prompt", prompt,
                                             "--num-tokens", "64"], env, prefix))
        rows = pair.race(contenders, args.rounds, 1)
        print(pair.table(f"greedy generation, {dtype}, 64 tokens", rows, 64, "tokens/s"))
        for other in rows[1:]:
            same = sum(a == b for a, b in zip(rows[0]["last"]["ids"], other["last"]["ids"]))
            print(f"{other['name']}: {same} of 64 tokens as transformers'  ")
        print(flush=True)


def make_jpegs(folder, count):
    import numpy
    from PIL import Image
    folder.mkdir(exist_ok=True)
    rng = numpy.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=numpy.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = numpy.clip(numpy.asarray(coarse, dtype=numpy.int16) + rng.normal(0, 14, (480, 640, 3)).astype(numpy.int16), 0, 255)
        Image.fromarray(noisy.astype(numpy.uint8)).save(folder / f"{i:04}.jpg", quality=90)


def load(work, args):
    """640x480 JPEG to 3x336x336, padded to a square."""
    count = 96 if args.short else 256
    make_jpegs(work / "jpegs", count)
    records = [{"id": str(i), "image": f"{i:04}.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
               for i in range(count)]
    (work / "jpegs.json").write_text(json.dumps(records))
    kinds = ["slow"] + (["fast"] if __import__("importlib.util").util.find_spec("torchvision") else [])
    contenders = [pair.Contender(f"transformers {kind} processor, {args.threads} workers",
                                 [sys.executable, HERE / "load_hf.py", work / "jpegs", kind, args.threads if args.threads > 1 else 0]) for kind in kinds]
    contenders.append(pair.Contender(f"Caldera, {args.threads} threads", [
        fixtures.CALDERA, "bench", "load", "--data", work / "jpegs.json", "--images", work / "jpegs", "--model", fixtures.ROOT / "checkpoints/scenes/language_model",
        "--template", "plain", "--workers", str(args.threads), "--image-aspect-ratio", "pad"], {"OMP_NUM_THREADS": "1"}, shlex.split(args.prefix)))
    print(pair.table(f"loading {count} pictures", pair.race(contenders, max(3, args.rounds // 2), 1), count, "pictures/s"), flush=True)


def tokenize(work, args):
    """Conversations of several rounds to ids and labels, one thread: the original preprocessing tokenises each text three times."""
    import random
    rng = random.Random(0)
    words = "red green blue circle square star top left bottom right and a the is there yes no two three".split()
    text = lambda n: " ".join(rng.choice(words) for _ in range(n))
    records = [{"id": str(i), "conversations": [turn for _ in range(rng.randint(1, 6)) for turn in (
        {"from": "human", "value": text(12)}, {"from": "gpt", "value": text(rng.randint(5, 90))})]} for i in range(200)]
    (work / "texts.json").write_text(json.dumps(records))
    contenders = [pair.Contender("transformers, LLaVA's preprocess_v1", [sys.executable, HERE / "tokenize_hf.py", work / "texts.json"], {"OMP_NUM_THREADS": "1"}),
                  pair.Contender("Caldera", [fixtures.CALDERA, "bench", "tokenize", "--data", work / "texts.json", "--model",
                                             fixtures.ROOT / "checkpoints/scenes/language_model", "--template", "v1"], {"OMP_NUM_THREADS": "1"})]
    print(pair.table("tokenising 200 conversations with labels", pair.race(contenders, args.rounds, 1), 200, "samples/s"), flush=True)


STARTUP = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1] + "/model", dtype=torch.float32)
print("READY", flush=True)
"""


def startup(work, args):
    """From starting the process to the model ready, and to the first training step done."""
    fixtures.make_batch(work, "llava", "v1")
    tokens = fixtures.MIXES["llava"]
    recipe = fixtures.recipe(work, "llava", "v1", 2, "float32", work / "run_start", max_steps=1)
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    (work / "startup.py").write_text(STARTUP)

    def until(command, steps):
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        assert process.stdout.readline() == "READY\n"
        if steps:
            process.stdin.write("step\n")
            process.stdin.flush()
            process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        return seconds

    batch = fixtures.make_batch(work, "llava", "v1")
    rows = [{**row, "image": record["image"]} for row, record in zip(batch["rows"], batch["records"])]
    (work / "llava_v1.tokens.json").write_text(json.dumps(rows))
    ready = {"transformers": [sys.executable, work / "startup.py", work, args.threads],
             "Caldera": [fixtures.CALDERA, "bench", "generate", "--model", work / "model", "--template", "v1", "--dtype", "float32", "--prompt", "x"]}
    step = {"transformers": [sys.executable, HERE / "step_hf.py", work, "llava", "v1", "--stage", 2, "--dtype", "float32", "--threads", args.threads],
            "Caldera": [fixtures.CALDERA, "bench", "train", recipe, "--resume", "never"]}
    print("**process start**\n\n| | s to the model | s to the first step done |\n|---|---|---|")
    times = {}
    for name in ready:
        until(ready[name], False)  # the files into memory
        times[name] = ([until(ready[name], False) for _ in range(5)], [until(step[name], True) for _ in range(3)])
        print(f"| {name} | {statistics.median(times[name][0]):.2f} | {statistics.median(times[name][1]):.2f} |")
    share = [statistics.median(times["Caldera"][i]) / statistics.median(times["transformers"][i]) for i in (0, 1)]
    print(f"\nCaldera's share: {share[0]:.2f} and {share[1]:.2f}.\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or pathlib.Path(temporary)
        work.mkdir(exist_ok=True)
        fixtures.make_model(work)
        for part in (generate, load, tokenize, startup):
            if args.only in part.__name__:
                part(work, args)


if __name__ == "__main__":
    main()
