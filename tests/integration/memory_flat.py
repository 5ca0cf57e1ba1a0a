#!/usr/bin/env python3
"""Trains a tiny model for 500 steps on samples of mixed lengths: its resident memory must not grow after the first steps.

  memory_flat.py CALDERA

Each step's packed row has another length, so whatever is kept by shape, or falls to pieces in the allocator, shows here."""
import json, os, pathlib, random, shutil, struct, subprocess, sys, tempfile

STEPS, SETTLED = 500, 100
BOUND_MIB = 48  # a cache that fills up to its bound after step 100, not one that goes on

work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_flat_"))
root = pathlib.Path(__file__).resolve().parents[2]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


try:
    write_json(work / "vision/config.json", {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                                             "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16})
    write_json(work / "language/config.json", {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                               "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4000,
                                               "max_position_embeddings": 1024})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(root / "checkpoints/scenes/language_model" / name, work / "language")
    rng = random.Random(0)
    words = "red green blue circle square top left and the is there two".split()
    (work / "images").mkdir()
    for i in range(8):  # BMP of 40 x 40 pixels, three bytes each
        header = struct.pack("<2sIII", b"BM", 54 + 4800, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 40, 40, 1, 24, 0, 4800, 0, 0, 0, 0)
        (work / f"images/{i}.bmp").write_bytes(header + rng.randbytes(4800))
    records = [{"id": str(i), "image": f"{i % 8}.bmp", "conversations": [
        {"from": "human", "value": "<image>\n" + " ".join(rng.choices(words, k=rng.randint(1, 60)))},
        {"from": "gpt", "value": " ".join(rng.choices(words, k=rng.randint(1, 120)))}]} for i in range(1000)]
    write_json(work / "data.json", records)
    for dtype in ("float32", "bfloat16"):
        stage = {"name": "tune", "trainable": ["projector", "language_model"], "global_batch_size": 4, "max_steps": STEPS, "dtype": dtype,
                 "save_steps": 0, "data": {"data_path": str(work / "data.json"), "image_folder": str(work / "images"),
                                           "conversation_template": "v1"}}
        write_json(work / "recipe.yaml", {"model": {"vision_tower": str(work / "vision"), "language_model": str(work / "language")},
                                          "stages": [stage], "output": str(work / dtype), "device": "cpu"})
        subprocess.run([os.path.abspath(sys.argv[1]), "train", work / "recipe.yaml"], check=True, stderr=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in open(work / dtype / "tune/metrics.jsonl")]
        peak = {line["step"]: line["peak_memory_bytes"] / 2**20 for line in lines if "loss" in line}
        grown = peak[STEPS] - peak[SETTLED]
        print(f"{dtype}: peak {peak[1]:.0f} MiB after step 1, {peak[SETTLED]:.0f} after {SETTLED}, {peak[STEPS]:.0f} after {STEPS}")
        assert grown < BOUND_MIB, f"{dtype}: the peak grew by {grown:.0f} MiB from step {SETTLED} to {STEPS}"
finally:
    shutil.rmtree(work, ignore_errors=True)
