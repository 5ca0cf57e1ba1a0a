#!/usr/bin/env python3
"""LLaVA's preprocess_v1 on a SentencePiece tokenizer of transformers, as a contender of pair.py:  tokenize_hf.py DATA.json
The conversation is rendered and tokenised as a whole, then each round and each instruction again for their lengths."""
import json, pathlib, sys, time

from transformers import LlamaTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
tokenizer = LlamaTokenizer.from_pretrained(ROOT / "checkpoints/scenes/language_model")
records = json.load(open(sys.argv[1]))
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
          "to the user's questions.")


def preprocess(record):
    text = SYSTEM + " "
    for turn in record["conversations"]:
        text += f"USER: {turn['value']} " if turn["from"] == "human" else f"ASSISTANT: {turn['value']}</s>"
    ids = tokenizer(text).input_ids
    labels = list(ids)
    at = 1
    labels[:at] = [-100] * at
    for round_ in text.split("</s>"):
        if not round_:
            break
        parts = round_.split(" ASSISTANT: ")
        length = len(tokenizer(round_).input_ids)
        instruction = len(tokenizer(parts[0] + " ASSISTANT: ").input_ids) - 2
        labels[at:at + instruction] = [-100] * instruction
        at += length
    labels[at:] = [-100] * (len(ids) - at)
    return ids, labels


print("READY", flush=True)
for line in sys.stdin:
    start, tokens = time.perf_counter(), 0
    for record in records:
        tokens += len(preprocess(record)[0])
    print(json.dumps({"s": time.perf_counter() - start, "tokens": tokens}), flush=True)
