#!/usr/bin/env python3
"""How far the curve of several ranks is from that of one, over many steps in float32. Usage: curves.py CALDERA [--steps 100] [--only TEXT...]

Both stages of scenes as its recipe has them (batch, learning rates, warm-up, packing), full and with adapters, on 2 and 4 ranks under every strategy,
compared with one rank; beside them one rank that packs its samples otherwise, which differs by rounding alone too. Prints the worst relative difference
of a step's loss, over the first twenty steps and over all, and of a final tensor (by its norm). Fails where a loss differs by more than 1e-5. Takes most
of an hour on two cores; --only "LoRA 4 ranks, zero1" "LoRA 2 ranks, zero2" compares those alone."""
import argparse, shutil

from ranks import STAGES, Runs

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--only", nargs="+", default=[""])
options = parser.parse_args()
runs = Runs(options.caldera, num_train=64 * options.steps)
OWN = dict(max_steps=options.steps, save_steps=0, global_batch_size=None, max_tokens_per_micro_batch=None)
KINDS = {"full": [], "LoRA": ["stages.finetune.lora.lora_r=16", "stages.finetune.lora.lora_dropout=0"]}


def train(kind, n, strategy, **settings):
    """Returns the run's name. The first stage has no adapters: with them, it is that of the full run on one rank."""
    name = f"{kind}_{n}_{strategy}_{len(settings)}"
    if kind != "full":
        (runs.work / name).mkdir()
        (runs.work / name / "pretrain").symlink_to(runs.work / "full_1_ddp_0/pretrain")
    runs.run(runs.start(n) + runs.train(name, strategy, *KINDS[kind], timeout_s=600, **OWN | settings), limit=3600)
    return name


def compare(kind, title, one, n, strategy, **settings):
    if not any(f"{kind} {title}".startswith(text) for text in options.only):
        return
    name = train(kind, n, strategy, **settings)
    for stage in STAGES if kind == "full" else STAGES[1:]:
        a, b = runs.losses(one, stage), runs.losses(name, stage)
        assert len(a) == options.steps
        first = max(abs(x - y) / x for x, y in zip(a[:20], b[:20]))
        loss, weights = runs.differences(one, name, stage)
        print(f"{kind:4} {stage:9} {title:24} loss {first:.1e} in 20 steps, {loss:.1e} in {len(a)}; weights {weights:.1e}", flush=True)
        assert loss <= 1e-5 and weights <= 1e-4, "further than rounding explains"
    shutil.rmtree(runs.work / name)


try:
    for kind in KINDS:
        one = train(kind, 1, "ddp")
        print(f"{kind:4} loss {', '.join(f'{stage} {runs.losses(one, stage)[0]:.3f} -> {runs.losses(one, stage)[-1]:.3f}' for stage in STAGES)}", flush=True)
        for n, strategy in [(n, strategy) for strategy in ("ddp", "zero1", "zero2", "zero3") for n in (2, 4)]:
            compare(kind, f"{n} ranks, {strategy}", one, n, strategy)
        compare(kind, "1 rank, packed otherwise", one, 1, "ddp", max_tokens_per_micro_batch=1500)
finally:
    runs.remove()
