#!/usr/bin/env python3
"""Makes tests/golden/adamw_8bit.safetensors: bitsandbytes' dynamic maps, and four updates of its block-wise 8-bit AdamW on the CPU.

    pip install bitsandbytes safetensors torch
    scripts/make_goldens_optimizer.py
"""
import pathlib

import torch
from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import save_file

PATH = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/adamw_8bit.safetensors"
COUNT, STEPS = 600, 4  # two blocks of 256 and a part of one


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    maps = {"map.signed": create_dynamic_map(True), "map.unsigned": create_dynamic_map(False)}
    tensors = dict(maps)
    weight = torch.randn(COUNT)
    gradients = torch.randn(STEPS, COUNT) * torch.logspace(-4, 0, COUNT)  # of magnitudes far apart
    tensors["weight"], tensors["gradients"] = weight.clone(), gradients
    codes = [torch.zeros(COUNT, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros((COUNT + 255) // 256) for _ in range(2)]
    for step in range(STEPS):
        optimizer_update_8bit_blockwise_pytorch(
            weight, gradients[step], codes[0], codes[1], 0.9, 0.98, 0.0, 0.0, 1e-8, step + 1, 1e-2, maps["map.signed"],
            maps["map.unsigned"], scales[0], scales[1], 0.1, 0.7, False, optimizer_name="adam")
        tensors[f"weight.{step}"] = weight.clone()
        for i, name in enumerate(("exp_avg", "exp_avg_sq")):
            tensors[f"{name}.codes.{step}"], tensors[f"{name}.scale.{step}"] = codes[i].clone(), scales[i].clone()
    save_file(tensors, PATH)


if __name__ == "__main__":
    main()
