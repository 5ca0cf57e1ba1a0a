#!/usr/bin/env python3
"""Makes tests/golden/nf4.safetensors: bitsandbytes' 4-bit NormalFloat of a weight on the CPU, without and with double quantisation.

    pip install bitsandbytes safetensors torch
    scripts/make_goldens_nf4.py
"""
import pathlib

import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from safetensors.torch import save_file

PATH = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/nf4.safetensors"
ROWS, COLUMNS = 68, 256  # 272 blocks of 64, in two groups of 256 with double quantisation


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * 0.02 * torch.rand(ROWS, 1)
    weight[5, 64:192] = 0  # blocks of nothing
    weight = weight.to(torch.bfloat16)
    tensors = {"values": get_4bit_type("nf4", device="cpu"), "weight": weight}
    for name, double_quant in (("single", False), ("double", True)):
        codes, state = quantize_4bit(weight.float(), blocksize=64, compress_statistics=double_quant, quant_type="nf4")
        tensors[f"{name}.codes"] = codes.flatten()
        tensors[f"{name}.absmax"] = state.absmax
        if double_quant:
            tensors["double.group_absmax"], tensors["double.offset"] = state.state2.absmax, state.offset
        restored = dequantize_4bit(codes, state)
        tensors[f"{name}.first_rows"] = restored[:8].contiguous()
        state.dtype = torch.bfloat16
        tensors[f"{name}.first_rows_bfloat16"] = dequantize_4bit(codes, state)[:8].contiguous()
    save_file(tensors, PATH)


if __name__ == "__main__":
    main()
