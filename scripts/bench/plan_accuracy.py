#!/usr/bin/env python3
"""Holds the peak that `caldera plan` foretells against the one that `caldera train` takes, over a dozen recipes of random models.

  plan_accuracy.py [--steps N] [--only TEXT] [--write]     --write puts the table into docs/performance.md, between its two marks

Peaks are the process's resident maximum (getrusage), the program and the loading of the weights included. One thread, on the CPU."""
import argparse, json, os, pathlib, random, re, shutil, subprocess, tempfile

import fixtures

BEGIN, END = "<!-- measured: scripts/bench/plan_accuracy.py -->\n", "<!-- end of plans -->\n"
WORDS = "red green blue circle square star top left bottom right and a the is there yes no two three".split()
LLAMA = {"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
         "intermediate_size": 1376, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False}
GQA = {**LLAMA, "hidden_size": 640, "num_attention_heads": 10, "num_key_value_heads": 2, "intermediate_size": 2048}
TIED = {**LLAMA, "model_type": "qwen2", "hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1, "vocab_size": 96000,
        "tie_word_embeddings": True}
DEEP = {**LLAMA, "model_type": "qwen3", "head_dim": 64, "num_hidden_layers": 20, "hidden_size": 384, "intermediate_size": 1024}
TUNE, PROJECTOR = ["projector", "language_model"], ["projector"]
# (what, decoder, words of an answer, what the stage sets). "saves": a budget that takes this share of what recomputing all blocks would.
CASES = [
    ("stage 1, float32", LLAMA, 60, {"trainable": PROJECTOR}),
    ("stage 1, bfloat16, all three parts train", LLAMA, 60, {"trainable": [*TUNE, "vision_tower"], "dtype": "bfloat16"}),
    ("stage 2, float32", LLAMA, 100, {}),
    ("stage 2, bfloat16", LLAMA, 100, {"dtype": "bfloat16"}),
    ("float32, three micro-batches", LLAMA, 100, {"max_tokens_per_micro_batch": 700}),
    ("bfloat16, three micro-batches", LLAMA, 100, {"dtype": "bfloat16", "max_tokens_per_micro_batch": 700}),
    ("float32, all blocks recompute", DEEP, 100, {"gradient_checkpointing": True}),
    ("bfloat16, a budget: some MLPs recompute", DEEP, 100, {"dtype": "bfloat16", "saves": 0.2}),
    ("float32, a budget: all MLPs recompute", DEEP, 100, {"saves": 0.5}),
    ("bfloat16, a budget: some blocks recompute", DEEP, 100, {"dtype": "bfloat16", "saves": 0.8}),
    ("float32, grouped queries", GQA, 150, {}),
    ("bfloat16, tied, 96000 tokens", TIED, 100, {"dtype": "bfloat16"}),
    ("float32, LoRA", GQA, 100, {"lora": {"lora_r": 16}}),
    ("bfloat16, 8-bit states", GQA, 100, {"dtype": "bfloat16", "optimizer": {"optim": "adamw_8bit"}}),
    ("bfloat16, 8-bit states, no masters", GQA, 100, {"dtype": "bfloat16", "optimizer": {"optim": "adamw_8bit", "master_weights": "none"}}),
]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_data(path, images, answer_words, count=64):
    rng = random.Random(answer_words)
    records = [{"id": str(i), "image": f"{i % 16}.png", "conversations": [
        {"from": "human", "value": "<image>\n" + " ".join(rng.choices(WORDS, k=20))},
        {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(answer_words // 2, answer_words * 3 // 2)))}]} for i in range(count)]
    write_json(path, records)
    images.mkdir(exist_ok=True)
    from PIL import Image
    for i in range(16):
        Image.frombytes("RGB", (112, 112), rng.randbytes(3 * 112 * 112)).save(images / f"{i}.png")


def measure(work, case, steps):
    what, decoder, words, changes = case
    folder = work / re.sub(r"\W+", "_", what)
    write_json(folder / "vision/config.json", {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024,
                                               "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 112, "patch_size": 14})
    write_json(folder / "language/config.json", decoder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(fixtures.ROOT / "checkpoints/scenes/language_model" / name, folder / "language")
    make_data(folder / "data.json", folder / "images", words)
    changes = dict(changes)
    saves = changes.pop("saves", None)
    stage = {"name": "stage", "trainable": TUNE, "global_batch_size": 8, "max_steps": steps, "save_steps": 0, **changes,
             "data": {"data_path": str(folder / "data.json"), "image_folder": str(folder / "images"), "conversation_template": "v1",
                      "dataloader_num_workers": 1}}
    recipe = {"model": {"vision_tower": str(folder / "vision"), "language_model": str(folder / "language"), "random_parts": ["vision_tower", "language_model"]}, "stages": [stage],
              "output": str(folder / "run"), "device": "cpu"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def planned():
        write_json(folder / "recipe.yaml", recipe)
        plan = subprocess.run([fixtures.CALDERA, "plan", folder / "recipe.yaml", "--json"], env=env, check=True, capture_output=True, text=True)
        return json.loads(plan.stdout)[0]

    plan = planned()
    if saves is not None:
        total = plan["memory"]["total"]
        stage["memory"] = {"budget_gb": (total - saves * (total - plan["least_memory"]["total"])) / 1e9}
        plan = planned()
        what += f" ({plan['num_recomputed_mlps']} MLPs, {plan['num_recomputed_blocks']} blocks of {plan['num_blocks']})"
    memory = plan["memory"]
    trained = subprocess.run([fixtures.CALDERA, "train", folder / "recipe.yaml"], env=env, capture_output=True, text=True)
    if trained.returncode != 0:
        raise SystemExit(f"{what}:\n{trained.stderr[-2000:]}")
    lines = [json.loads(line) for line in open(folder / "run/stage/metrics.jsonl")]
    measured = max(line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line)
    shutil.rmtree(folder)
    return {"what": what, "planned": memory["total"], "measured": measured, "moment": memory["moment"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = "| stage | planned MiB | measured MiB | planned / measured | at |\n|---|---|---|---|---|\n"
    print(text, end="")
    off = []
    with tempfile.TemporaryDirectory() as work:
        for case in CASES:
            if args.only not in case[0]:
                continue
            row = measure(pathlib.Path(work), case, args.steps)
            off.append(row["planned"] / row["measured"] - 1)
            line = f"| {row['what']} | {row['planned'] / 2**20:.0f} | {row['measured'] / 2**20:.0f} | {1 + off[-1]:.3f} | {row['moment']} |\n"
            print(line, end="", flush=True)
            text += line
    summary = f"\nFurthest off: {100 * max(off, key=abs):+.1f} %.\n"
    print(summary)
    if args.write:
        page_path = fixtures.ROOT / "docs/performance.md"
        page = page_path.read_text()
        begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        page_path.write_text(page[:begin] + text + summary + page[end:])


if __name__ == "__main__":
    main()
