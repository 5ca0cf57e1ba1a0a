#!/usr/bin/env python3
"""How far the curve of several ranks is from that of one, over many steps in float32. Usage: curves.py CALDERA [--steps 100]

Both stages of scenes, full and with adapters, on 1, 2 and 4 ranks under every strategy; beside them one rank that packs its samples otherwise,
which differs by rounding alone too. Prints the worst relative difference of a step's loss, over the first twenty steps and over all, and of a final
tensor (by its norm). Fails where several ranks are much further from one rank than one rank is from itself."""
import argparse, shutil

from ranks import LORA, STAGES, Runs

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()
runs = Runs(options.caldera, num_train=400)
SETTINGS = dict(global_batch_size=8, max_steps=options.steps, save_steps=0)
PACKINGS = (1, 250, 1000)  # max_tokens_per_micro_batch; 1: each sample by itself


def compare(kind, title, name, stages):
    """The worst difference of a loss in any stage."""
    worst = 0
    for stage in stages:
        a, b = runs.losses(f"one_{kind}", stage), runs.losses(name, stage)
        first = max(abs(x - y) / x for x, y in zip(a[:20], b[:20]))
        loss, weights = runs.differences(f"one_{kind}", name, stage)
        print(f"{kind:4} {stage:9} {title:24} loss {first:.1e} in 20 steps, {loss:.1e} in {len(a)}; weights {weights:.1e}", flush=True)
        assert first <= 1e-5 and weights <= 1e-4, "further than rounding explains"
        worst = max(worst, loss)
    return worst


try:
    for kind, words in (("full", []), ("LoRA", LORA + ["stages.finetune.lora.lora_dropout=0"])):
        stages = STAGES if kind == "full" else ["finetune"]  # the first stage has no adapters: it is the same
        itself = 0
        for tokens in (500, *PACKINGS):
            name = f"one_{kind}" if tokens == 500 else f"packed_{tokens}_{kind}"
            runs.run([runs.caldera, *runs.train(name, "ddp", *words, **SETTINGS, max_tokens_per_micro_batch=tokens)], limit=3600)
            if tokens != 500:
                itself = max(itself, compare(kind, f"1 rank, packed to {tokens}", name, stages))
        for n in (2, 4):
            for strategy in ("ddp", "zero1", "zero2", "zero3"):
                name = f"{strategy}_{n}_{kind}"
                runs.run(runs.start(n) + runs.train(name, strategy, *words, **SETTINGS, max_tokens_per_micro_batch=500), limit=3600)
                loss = compare(kind, f"{n} ranks, {strategy}", name, stages)
                assert loss <= max(1e-5, 10 * itself), f"{loss} where one rank differs from itself by {itself}"
                shutil.rmtree(runs.work / name)
finally:
    runs.remove()
