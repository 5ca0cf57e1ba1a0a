#!/usr/bin/env python3
"""transformers' training step on one batch, as a contender of pair.py.

  step_hf.py WORK MIX TEMPLATE --stage 1|2 --dtype float32|bfloat16|autocast [--lora] [--packed] [--compile] [--checkpointing]

bfloat16: weights, gradients and AdamW's states in bfloat16; autocast: float32 weights under autocast. --packed: the samples in one row with
restarting position_ids, transformers' padding-free form. --lora: PEFT's adapters of rank 128 on the decoder's linear layers, as LLaVA has them."""
import argparse, json, pathlib, sys, time

import numpy, torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

import fixtures

parser = argparse.ArgumentParser()
parser.add_argument("work", type=pathlib.Path)
parser.add_argument("mix")
parser.add_argument("template")
parser.add_argument("--stage", type=int)
parser.add_argument("--dtype")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default="cpu")
for flag in ("--packed", "--compile", "--checkpointing", "--lora"):
    parser.add_argument(flag, action="store_true")
args = parser.parse_args()
torch.set_num_threads(args.threads)

dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
model = LlavaForConditionalGeneration.from_pretrained(args.work / "model", dtype=dtype, attn_implementation="sdpa").to(args.device).train()
model.config.use_cache = model.config.text_config.use_cache = False
if args.checkpointing:
    model.gradient_checkpointing_enable()
if args.lora:
    import peft
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=fixtures.LORA["lora_r"], lora_alpha=fixtures.LORA["lora_alpha"], lora_dropout=fixtures.LORA["lora_dropout"],
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"), autocast_adapter_dtype=False)
trained = []
for name, parameter in model.named_parameters():
    is_decoder = "lora_" in name if args.lora else "vision_tower" not in name
    parameter.requires_grad_("multi_modal_projector" in name or (args.stage == 2 and is_decoder))
    if parameter.requires_grad:
        trained.append(parameter)
optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0, fused=True)

batch = json.loads((args.work / f"{args.mix}_{args.template}.tokens.json").read_text())
processor = CLIPImageProcessor.from_pretrained(args.work / "model")
pixels = torch.cat([processor(Image.open(args.work / "images" / row["image"]), return_tensors="pt")["pixel_values"] for row in batch])
rows = [(torch.tensor(row["ids"]), torch.tensor(row["labels"])) for row in batch]
rows = [(torch.where(ids == -200, fixtures.IMAGE_TOKEN, ids), labels) for ids, labels in rows]
if args.packed:
    for _, labels in rows:
        labels[0] = -100
    inputs = {"input_ids": torch.cat([ids for ids, _ in rows])[None], "labels": torch.cat([labels for _, labels in rows])[None],
              "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None]}
else:
    pad = lambda values, value: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)
    inputs = {"input_ids": pad([ids for ids, _ in rows], 0), "labels": pad([labels for _, labels in rows], -100),
              "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], 0)}
inputs["pixel_values"] = pixels.to(dtype)
inputs = {name: value.to(args.device) for name, value in inputs.items()}
forward = torch.compile(model) if args.compile else model


def step():
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "autocast"):
        loss = forward(**inputs).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return loss.item(), norm.item()


def peak_mib():
    if args.device == "cuda":
        return torch.cuda.max_memory_reserved() >> 20
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


print("READY", flush=True)
open("/proc/self/clear_refs", "w").write("5")
for line in sys.stdin:
    start = time.perf_counter()
    loss, norm = step()
    print(json.dumps({"s": time.perf_counter() - start, "hwm": peak_mib(), "loss": loss, "grad_norm": norm}), flush=True)
