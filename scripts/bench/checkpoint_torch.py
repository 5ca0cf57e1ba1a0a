#!/usr/bin/env python3
"""A training state written, or a model read, as PyTorch's users do, as a contender of pair.py:
  checkpoint_torch.py WORK save torch|safetensors      checkpoint_torch.py WORK open torch|safetensors|transformers
save: float32 weights and both of AdamW's moments. open: the model's weights, copied into memory of one's own."""
import json, pathlib, sys, time

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

work, what, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
file = work / f"{what}.{how}"
weights = load_file(work / "model/model.safetensors")
if what == "save":
    state = {f"{part}.{name}": torch.rand_like(value) for part in ("weight", "exp_avg", "exp_avg_sq") for name, value in weights.items()}
elif how == "torch":
    torch.save(weights, file)


def save():
    torch.save(state, file) if how == "torch" else save_file(state, file)


def load():
    if how == "transformers":
        return LlavaForConditionalGeneration.from_pretrained(work / "model", dtype=torch.float32)
    source = torch.load(file, mmap=True) if how == "torch" else load_file(work / "model/model.safetensors")
    return {name: value.clone() for name, value in source.items()}


print("READY", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    kept = save() if what == "save" else load()
    print(json.dumps({"s": time.perf_counter() - start}), flush=True)
    del kept
