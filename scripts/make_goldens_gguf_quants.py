#!/usr/bin/env python3
"""Makes tests/golden/gguf_quants.safetensors: blocks of random bits in each of ggml's quantised types that are read, with what
llama.cpp's Python package makes of them ("TYPE.bytes", "TYPE.values"); and values ("values") with the bytes that ggml's own
quantisers make of them ("TYPE.quantised").

    pip install safetensors gguf
    scripts/make_goldens_gguf_quants.py LIBGGML

LIBGGML is the libggml-base.so of a llama.cpp that was built with -DGGML_NATIVE=OFF: fused multiply-adds give other bytes."""
import ctypes
import pathlib
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
BLOCKS = 12
# Where each type keeps its float16 numbers: random bits there would be infinities and NaN.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
WRITTEN = ["Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def read_blocks(random: np.random.Generator) -> dict:
    tensors = {}
    for name, halves in HALVES.items():
        kind = GGMLQuantizationType[name]
        blocks = random.integers(0, 256, (BLOCKS, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for at in halves:
            blocks[:, at : at + 2] = random.normal(0, 0.1, (BLOCKS, 1)).astype(np.float16).view(np.uint8)
        tensors[name + ".bytes"] = blocks
        tensors[name + ".values"] = dequantize(blocks, kind).astype(np.float32).reshape(-1)
    return tensors


def values_to_write(random: np.random.Generator) -> np.ndarray:
    """Rows of 256: as weights are, all of one sign, mostly zero, with outliers, of few values, constant, tiny, half zero, zero."""
    x = random.normal(0, 0.03, (12, 256)).astype(np.float32)
    x[2], x[3] = np.abs(x[2]), -np.abs(x[3])
    x[4, random.random(256) < 0.9] = 0
    x[5, random.random(256) < 0.02] *= 30
    x[6] = np.round(x[6] * 50) / 50
    x[7] = 0.25
    x[8] *= 1e-5
    x[9, :128] = 0
    x[10] = 0
    return x


def quantise(library: ctypes.CDLL, name: str, values: np.ndarray) -> np.ndarray:
    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    out = np.zeros((values.size // block, num_bytes), np.uint8)
    function = getattr(library, f"quantize_row_{name[:2].lower()}{name[2:]}_ref")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(values.ctypes.data, out.ctypes.data, values.size)
    return out


def main() -> None:
    random = np.random.default_rng(20)
    tensors = read_blocks(random)
    tensors["values"] = values_to_write(random)
    library = ctypes.CDLL(sys.argv[1])
    for name in WRITTEN:
        tensors[name + ".quantised"] = quantise(library, name, tensors["values"])
    save_file(tensors, GOLDEN / "gguf_quants.safetensors")


if __name__ == "__main__":
    main()
