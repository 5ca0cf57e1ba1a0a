#!/usr/bin/env python3
"""Everything but the training step: generation, tokenising, picture loading, checkpoints, start-up.

  others.py [--short] [--rounds N] [--threads N] [--prefix "nice -n -15 taskset -c 1"] [--only NAME]"""
import argparse, importlib.util, json, os, pathlib, shlex, statistics, subprocess, sys, tempfile, time

import fixtures, pair

HERE = pathlib.Path(__file__).parent


def python(script, *arguments):
    return [sys.executable, HERE / script, *arguments]


def bench(what, *arguments):
    return [fixtures.CALDERA, "bench", what, *arguments]


def generate(work, args, say):
    """64 greedy tokens after a prompt with a picture; prefill counts."""
    fixtures.make_batch(work, "llava", "v1")
    prompt = "red circle left blue star"
    record = {"id": "p", "image": "llava0.png", "conversations": [{"from": "human", "value": "<image>\n" + prompt}, {"from": "gpt", "value": "x"}]}
    row = fixtures.preview(work, [record], "v1")[0]
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    (work / "prompt.json").write_text(json.dumps(row["ids"][:first]))
    prefix, env = shlex.split(args.prefix), {"OMP_NUM_THREADS": str(args.threads)}
    for dtype in ("float32", "bfloat16"):
        contenders = [pair.Contender(f"transformers {dtype}", python("generate_hf.py", work, dtype, 64, args.threads),
                                     {**env, **pair.TUNED_MALLOC}, prefix)]
        for name in [dtype] + (["int8"] if dtype == "bfloat16" else []):
            contenders.append(pair.Contender(f"Caldera {name}", bench(
                "generate", "--model", work / "model", "--template", "v1", "--dtype", name, "--device", "cpu", "--image",
                work / "images/llava0.png", "--prompt", prompt, "--num-tokens", 64), env, prefix))
        rows = pair.race(contenders, args.rounds, 1)
        lines = [pair.table(f"greedy generation, {dtype}, 64 tokens", rows, 64, "tokens/s")]
        for other in rows[1:]:
            same = sum(a == b for a, b in zip(rows[0]["last"]["ids"], other["last"]["ids"]))
            lines.append(f"{other['name']}: {same} of 64 tokens as transformers'  ")
        say("\n".join(lines) + "\n")


def tokenize(work, args, say):
    """Conversations of several rounds to ids and labels, one thread."""
    count = 200
    tokenizer, texts = fixtures.make_text_tokenizer(work), fixtures.make_conversations(work, count)
    prefix, env = shlex.split(args.prefix), {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    contenders = [pair.Contender(f"transformers {kind}", python("tokenize_hf.py", texts, tokenizer, kind), env, prefix) for kind in ("slow", "fast")]
    contenders.append(pair.Contender("Caldera", bench("tokenize", "--data", texts, "--model", tokenizer, "--template", "v1"), env, prefix))
    rows = pair.race(contenders, args.rounds, 1)
    measured = [row for row in rows if not row["failure"]]
    say(pair.table(f"tokenising {count} conversations with labels, one thread", rows, count, "samples/s") + "\n"
        + "First pass, nothing remembered: " + ", ".join(f"{row['name']} {row['first'][0]['s']:.4f} s" for row in measured) + ".  \n"
        + "Tokens: " + ", ".join(f"{row['name']} {row['last']['tokens']}" for row in measured) + ".\n")


def make_jpegs(folder, count):
    import numpy
    from PIL import Image
    folder.mkdir(exist_ok=True)
    rng = numpy.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=numpy.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = numpy.clip(numpy.asarray(coarse, dtype=numpy.int16) + rng.normal(0, 14, (480, 640, 3)).astype(numpy.int16), 0, 255)
        Image.fromarray(noisy.astype(numpy.uint8)).save(folder / f"{i:04}.jpg", quality=90)


def load(work, args, say):
    """640x480 JPEG to 3x336x336, padded to a square."""
    count = 96 if args.short else 256
    make_jpegs(work / "jpegs", count)
    records = [{"id": str(i), "image": f"{i:04}.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
               for i in range(count)]
    (work / "jpegs.json").write_text(json.dumps(records))
    prefix, env, workers = shlex.split(args.prefix), {"OMP_NUM_THREADS": "1"}, args.threads if args.threads > 1 else 0
    contenders = [pair.Contender("transformers slow", python("load_hf.py", work / "jpegs", "slow", workers), env, prefix)]
    if importlib.util.find_spec("torchvision"):
        contenders.append(pair.Contender("transformers fast", python("load_hf.py", work / "jpegs", "fast", workers), env, prefix))
    contenders.append(pair.Contender("Caldera", bench(
        "load", "--data", work / "jpegs.json", "--images", work / "jpegs", "--model", fixtures.ROOT / "checkpoints/scenes/language_model",
        "--template", "plain", "--workers", args.threads, "--image-aspect-ratio", "pad"), env, prefix))
    rows = pair.race(contenders, max(3, args.rounds // 2), 1)
    say(pair.table(f"loading {count} pictures, {args.threads} worker{'s' if args.threads > 1 else ''}", rows, count, "pictures/s") + "\n"
        + ("" if importlib.util.find_spec("torchvision") else "transformers' fast processor: not measured, torchvision is not installed.\n"))


def checkpoint(work, args, say):
    """A training state (float32 weights and AdamW's two moments) written; a model's weights read."""
    prefix, env = shlex.split(args.prefix), {"OMP_NUM_THREADS": "1"}
    size = 3 * (work / "model/model.safetensors").stat().st_size / 1e9
    saving = [pair.Contender(name, python("checkpoint_torch.py", work, "save", how), env, prefix)
              for name, how in (("torch.save", "torch"), ("safetensors", "safetensors"))]
    saving.append(pair.Contender("Caldera", bench("save", "--model", work / "model", "--out", work / "saved"), env, prefix))
    rows = pair.race(saving, max(3, args.rounds // 2), 1)
    whole, slowed = (statistics.median([step[name] for step in saving[-1].steps]) for name in ("written_s", "slowed_s"))
    say(pair.table(f"saving a training state of {size:.2f} GB: what training waits for", rows) + "\n"
        + f"Caldera writes beside the next step (here half a second of products on one thread, which take {slowed:.2f} s longer); the checkpoint, flushed to disk and with "
        f"checksums, stands after {whole:.2f} s, that half second included. The others do not flush.\n")
    opening = [pair.Contender(name, python("checkpoint_torch.py", work, "open", how), env, prefix)
               for name, how in (("torch.load", "torch"), ("safetensors", "safetensors"), ("transformers from_pretrained", "transformers"))]
    opening.append(pair.Contender("Caldera", bench("open", "--model", work / "model", "--template", "v1", "--dtype", "float32", "--device", "cpu"), env, prefix))
    say(pair.table(f"reading a model of {size / 3:.2f} GB into memory", pair.race(opening, max(3, args.rounds // 2), 1)) + "\n")


STARTUP = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1] + "/model", dtype=torch.float32)
print("READY", flush=True)
"""


def startup(work, args, say):
    """From starting the process to the model ready, and to the first training step done."""
    batch = fixtures.make_batch(work, "llava", "v1")
    tokens = [{**row, "image": record["image"]} for row, record in zip(batch["rows"], batch["records"])]
    (work / "llava_v1.tokens.json").write_text(json.dumps(tokens))
    recipe = fixtures.recipe(work, "llava", "v1", 2, "float32", work / "run_start", max_steps=1)
    (work / "startup.py").write_text(STARTUP)
    env, prefix = {**os.environ, **pair.WAITING, "OMP_NUM_THREADS": str(args.threads)}, shlex.split(args.prefix)

    def until(command, steps):
        start = time.perf_counter()
        process = subprocess.Popen([*prefix, *(str(c) for c in command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True, env=env)
        assert process.stdout.readline() == "READY\n"
        if steps:
            process.stdin.write("step\n")
            process.stdin.flush()
            process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        return seconds

    ready = {"transformers": [sys.executable, work / "startup.py", work, args.threads],
             "Caldera": bench("generate", "--model", work / "model", "--template", "v1", "--dtype", "float32", "--prompt", "x")}
    step = {"transformers": python("step_hf.py", work, "llava", "v1", "--stage", 2, "--dtype", "float32", "--threads", args.threads),
            "Caldera": bench("train", recipe, "--resume", "never")}
    for name in ready:
        until(ready[name], False)  # the files into memory
    rounds = range(3 if args.short or args.rounds < 5 else 5)
    times = {name: ([], []) for name in ready}
    for _ in rounds:
        for name in ready:
            times[name][0].append(until(ready[name], False))
            times[name][1].append(until(step[name], True))
    median = {name: [statistics.median(part) for part in parts] for name, parts in times.items()}
    lines = ["**process start**", "", "| | s to the model | s to the first step done |", "|---|---|---|"]
    lines += [f"| {name} | {ready_s:.2f} | {step_s:.2f} |" for name, (ready_s, step_s) in median.items()]
    share = [median["Caldera"][i] / median["transformers"][i] for i in (0, 1)]
    say("\n".join(lines) + f"\n\nCaldera's share: {share[0]:.2f} and {share[1]:.2f}.\n")


PARTS = (generate, tokenize, load, checkpoint, startup)


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
        for part in PARTS:
            if args.only in part.__name__:
                part(work, args, print)


if __name__ == "__main__":
    main()
