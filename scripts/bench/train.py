#!/usr/bin/env python3
"""Training steps of both stages: Caldera (its own trainer, through the binary) against transformers, padded and at its best.

  train.py [--short] [--rounds N] [--threads N] [--device cpu|cuda] [--prefix "nice -n -15 taskset -c 1"] [--only TEXT] [--json FILE]"""
import argparse, json, pathlib, shlex, sys, tempfile

import fixtures, pair

HERE = pathlib.Path(__file__).parent


def cases(short):
    """(title, mix, template, stage, dtype, settings of transformers)"""
    padded, packed = ("padded", []), ("packed", ["--packed"])
    compiled = ("packed, compiled", ["--packed", "--compile"])
    for dtype in ("float32", "bfloat16"):
        yield "stage 2, LLaVA-like lengths", "llava", "v1", 2, dtype, [padded, packed] + ([] if short else [compiled])
        yield "stage 1, captions", "captions", "plain", 1, dtype, [padded, packed]
        yield "stage 2, no padding in the batch", "uniform", "v1", 2, dtype, [padded]
        if not short:
            yield "stage 2, long conversations", "long", "v1", 2, dtype, [padded, packed]


def run(work, case, args, say):
    title, mix, template, stage, dtype, settings = case
    batch = fixtures.make_batch(work, mix, template)
    tokens = [{**row, "image": record["image"]} for row, record in zip(batch["rows"], batch["records"])]
    (work / f"{mix}_{template}.tokens.json").write_text(json.dumps(tokens))
    real = sum(len(row["ids"]) for row in batch["rows"])
    padded = max(len(row["ids"]) for row in batch["rows"]) * len(batch["rows"])
    prefix = shlex.split(args.prefix)
    env = {"OMP_NUM_THREADS": str(args.threads)}
    contenders = []
    for name, flags in settings:
        command = [sys.executable, HERE / "step_hf.py", work, mix, template, "--stage", stage, "--dtype", dtype, "--threads", args.threads,
                   "--device", args.device, *flags]
        contenders.append(pair.Contender("transformers " + name, command, {**env, **pair.TUNED_MALLOC}, prefix))
    if dtype == "bfloat16":  # what Caldera's bfloat16 amounts to: float32 masters, gradients' sums and moments
        command = [sys.executable, HERE / "step_hf.py", work, mix, template, "--stage", stage, "--dtype", "autocast", "--threads", args.threads,
                   "--device", args.device]
        contenders.append(pair.Contender("transformers padded, autocast", command, {**env, **pair.TUNED_MALLOC}, prefix))
    recipe = fixtures.recipe(work, mix, template, stage, dtype, work / "run", args.device)
    contenders.append(pair.Contender("Caldera", [fixtures.CALDERA, "bench", "train", recipe, "--resume", "never"], env, prefix))
    rows = pair.race(contenders, args.rounds)
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
    return f"{case[1]} {case[3]} {case[4]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", help="cases whose 'mix stage dtype' holds this")
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or pathlib.Path(temporary)
        work.mkdir(exist_ok=True)
        fixtures.make_model(work)
        results = [run(work, case, args, print) for case in cases(args.short) if args.only in name_of(case)]
    if args.json:
        args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
