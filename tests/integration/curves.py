#!/usr/bin/env python3
"""How far the curve of several ranks is from that of one, over many steps in float32. Usage: curves.py CALDERA [--steps 100]

Both stages of scenes, full and with adapters, on 1, 2 and 4 ranks under every strategy; beside them one rank that packs its samples otherwise,
which differs by rounding alone too. Prints the worst relative difference of a step's loss and of a final tensor (by its norm)."""
import argparse

from ranks import LORA, STAGES, Runs

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()
runs = Runs(options.caldera, num_train=400)
SETTINGS = dict(global_batch_size=8, max_steps=options.steps, save_steps=0, max_tokens_per_micro_batch=500)
CASES = [(n, strategy) for n in (2, 4) for strategy in ("ddp", "zero1", "zero2", "zero3")]

try:
    for kind, words in (("full", []), ("LoRA", LORA + ["stages.finetune.lora.lora_dropout=0"])):
        stages = STAGES if kind == "full" else ["finetune"]  # the first stage has no adapters: it is the same
        runs.run([runs.caldera, *runs.train(f"one_{kind}", "ddp", *words, **SETTINGS)], limit=3600)
        runs.run([runs.caldera, *runs.train(f"packed_{kind}", "ddp", *words, **SETTINGS | {"max_tokens_per_micro_batch": 1200})], limit=3600)
        names = [(f"packed_{kind}", "1 rank, other packing")]
        for n, strategy in CASES if kind == "full" else [(2, "ddp"), (2, "zero3"), (4, "zero2")]:
            names.append((f"{strategy}_{n}_{kind}", f"{n} ranks, {strategy}"))
            runs.run(runs.start(n) + runs.train(names[-1][0], strategy, *words, **SETTINGS), limit=3600)
        for name, title in names:
            for stage in stages:
                loss, weights = runs.differences(f"one_{kind}", name, stage)
                print(f"{kind:4} {stage:9} {title:22} loss {loss:.1e}  weights {weights:.1e}", flush=True)
                assert loss <= 1e-5 and weights <= 1e-4, "further than rounding explains"
finally:
    runs.remove()
