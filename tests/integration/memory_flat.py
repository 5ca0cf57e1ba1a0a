#!/usr/bin/env python3
"""Trains a tiny model for 500 steps on samples of mixed lengths: its resident memory must not grow after the first steps.

  memory_flat.py CALDERA

Each step's packed row has another length, so whatever is kept by shape, or falls to pieces in the allocator, shows here."""
import json, os, pathlib, shutil, subprocess, sys, tempfile

from tiny import make_inputs, write_recipe

STEPS, SETTLED = 500, 100
BOUND_MIB = 48  # a cache that fills up to its bound after step 100, not one that goes on

work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_flat_"))
try:
    make_inputs(work, num_samples=1000)
    for dtype in ("float32", "bfloat16"):
        recipe = write_recipe(work, work / dtype, {"tune": {"trainable": ["projector", "language_model"], "max_steps": STEPS, "dtype": dtype}})
        subprocess.run([os.path.abspath(sys.argv[1]), "train", recipe], check=True, stderr=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in open(work / dtype / "tune/metrics.jsonl")]
        peak = {line["step"]: line["peak_memory_bytes"] / 2**20 for line in lines if "loss" in line}
        grown = peak[STEPS] - peak[SETTLED]
        print(f"{dtype}: peak {peak[1]:.0f} MiB after step 1, {peak[SETTLED]:.0f} after {SETTLED}, {peak[STEPS]:.0f} after {STEPS}")
        assert grown < BOUND_MIB, f"{dtype}: the peak grew by {grown:.0f} MiB from step {SETTLED} to {STEPS}"
finally:
    shutil.rmtree(work, ignore_errors=True)
