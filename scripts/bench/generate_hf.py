#!/usr/bin/env python3
"""transformers' greedy answer to one prompt, as a contender of pair.py:  generate_hf.py WORK DTYPE NUM_TOKENS PROMPT_LENGTH THREADS"""
import json, pathlib, sys, time

import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

import fixtures

work, dtype, count, threads = pathlib.Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model = LlavaForConditionalGeneration.from_pretrained(work / "model", dtype=dtype).eval()
ids = torch.tensor([json.loads((work / "prompt.json").read_text())])
pixels = CLIPImageProcessor.from_pretrained(work / "model")(Image.open(work / "images/llava0.png"), return_tensors="pt")["pixel_values"]
inputs = {"input_ids": torch.where(ids == -200, fixtures.IMAGE_TOKEN, ids), "pixel_values": pixels.to(dtype), "attention_mask": torch.ones_like(ids)}
print("READY", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    print(json.dumps({"s": time.perf_counter() - start, "ids": out[0, ids.shape[1]:].tolist()}), flush=True)
