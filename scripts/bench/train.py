#!/usr/bin/env python3
"""Training steps of both stages: Caldera (its own trainer, through the binary) against transformers, padded and at its best.

  train.py [--short] [--rounds N] [--threads N] [--prefix "nice -n -15 taskset -c 1"] [--only TEXT] [--json FILE]
  train.py --device cuda [--layers N] [--one-by-one] ...       LLaVA-1.5-7B's shapes, with N of the decoder's 32 blocks

--one-by-one: each contender runs when the one before has ended, where a GPU's memory does not hold all of them."""
import argparse, json, pathlib, shlex, sys, tempfile

import fixtures, pair

HERE = pathlib.Path(__file__).parent


LORA = {"lora": fixtures.LORA}


def cases(short, on_gpu=False):
    """(title, mix, template, stage, dtype, settings of transformers, settings of Caldera's stage)"""
    if on_gpu:  # as LLaVA's scripts run it; and at its best
        settings = [("padded", ["--checkpointing"])] + ([] if short else [("packed, compiled", ["--packed", "--compile"])])
        yield "stage 2", "llava", "v1", 2, "bfloat16", settings, {}
        yield "stage 1", "captions", "plain", 1, "bfloat16", settings, {}
        yield "LoRA", "llava", "v1", 2, "bfloat16", settings, LORA
        return
    padded, packed = ("padded", []), ("packed", ["--packed"])
    compiled = ("packed, compiled", ["--packed", "--compile"])
    for dtype in ("float32", "bfloat16"):
        yield "stage 2, LLaVA-like lengths", "llava", "v1", 2, dtype, [padded, packed] + ([] if short else [compiled]), {}
        yield "stage 1, captions", "captions", "plain", 1, dtype, [padded, packed], {}
        yield "stage 2, no padding in the batch", "uniform", "v1", 2, dtype, [padded], {}
        yield "LoRA", "llava", "v1", 2, dtype, [padded, packed], LORA
        if not short:
            yield "stage 2, long conversations", "long", "v1", 2, dtype, [padded, packed], {}


def run(work, case, args, say, shape=fixtures.SMALL, one_by_one=False, more={}):
    """`more`: settings of Caldera's stage, as well."""
    title, mix, template, stage, dtype, settings, changes = case
    on_gpu, lora = args.device == "cuda", "lora" in changes
    batch = fixtures.make_batch(work, mix, template, shape)
    tokens = [{**row, "image": record["image"]} for row, record in zip(batch["rows"], batch["records"])]
    (work / f"{mix}_{template}.tokens.json").write_text(json.dumps(tokens))
    real = sum(len(row["ids"]) for row in batch["rows"])
    padded = max(len(row["ids"]) for row in batch["rows"]) * len(batch["rows"])
    if on_gpu:
        title += f", {shape.text['num_hidden_layers']} blocks of LLaVA-1.5-7B"
    prefix = shlex.split(args.prefix)
    env = {} if on_gpu else {"OMP_NUM_THREADS": str(args.threads)}
    starts = []

    def add_transformers(name, dtype, flags):
        command = [sys.executable, HERE / "step_hf.py", work, mix, template, "--stage", stage, "--dtype", dtype, "--threads", args.threads,
                   "--device", args.device, *flags, *(["--lora"] if lora else [])]
        starts.append(lambda: pair.Contender(("PEFT " if lora else "transformers ") + name, command, {**env, **pair.TUNED_MALLOC}, prefix))

    for name, flags in settings:
        add_transformers(name, dtype, flags)
    if dtype == "bfloat16" and not on_gpu and not lora:  # what Caldera's bfloat16 amounts to: float32 masters, gradients' sums and moments
        add_transformers("padded, autocast", "autocast", [])

    recipe = fixtures.recipe(work, mix, template, stage, dtype, work / "run", args.device, shape, **changes, **more)
    starts.append(lambda: pair.Contender("Caldera", [fixtures.CALDERA, "bench", "train", recipe, "--resume", "never"], env, prefix))
    if one_by_one:
        rows = [row for start in starts for row in pair.race([start()], args.rounds)]
    else:
        rows = pair.race([start() for start in starts], args.rounds)
    # The same samples and mathematics: losses and gradient norms of the first two steps beside each other.
    measured = [row for row in rows if not row["failure"]]
    for row in measured:
        row["loss"] = [step["loss"] for step in row["first"]]
        row["grad_norm"] = [step["grad_norm"] for step in row["first"]]
        row["tokens_per_second"] = real / row["median_s"]
    lines = [pair.table(f"{title}, {dtype}: {real} tokens, {100 * real / padded:.0f} % of the padded batch", rows, real, "tokens/s")]
    for row in measured:
        lines.append(f"{row['name']}: losses {row['loss'][0]:.5f} {row['loss'][1]:.5f}, gradient norms {row['grad_norm'][0]:.4f} {row['grad_norm'][1]:.4f}  ")
    say("\n".join(lines) + "\n")
    return {"title": title, "mix": mix, "stage": stage, "dtype": dtype, "tokens": real, "padded_tokens": padded, "rows": rows}


def name_of(case):
    return f"{'lora' if case[6] else case[1]} {case[3]} {case[4]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", help="cases whose 'mix stage dtype' holds this; of LoRA 'lora 2 dtype'")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--set", type=json.loads, default={}, dest="more", help="settings of Caldera's stage, as JSON")
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    shape = fixtures.shape_of("7b", args.layers) if on_gpu else fixtures.SMALL
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or pathlib.Path(temporary)
        work.mkdir(exist_ok=True)
        fixtures.make_model(work, shape, args.device)
        results = [run(work, case, args, print, shape, args.one_by_one, args.more) for case in cases(args.short, on_gpu)
                   if args.only in name_of(case)]
    if args.json:
        args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
