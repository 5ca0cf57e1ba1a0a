#!/usr/bin/env python3
"""LLaVA's preprocess_v1 on a tokenizer of transformers, as a contender of pair.py:  tokenize_hf.py DATA.json FOLDER slow|fast
slow: Python over SentencePiece, LLaVA's own choice; fast: the tokenizers library. The conversation is rendered and tokenised as a whole, then
each round and each instruction again for their lengths."""
import json, sys, time

from transformers import LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

data, folder, kind = sys.argv[1:4]
if kind == "slow":
    tokenizer = SentencePieceBackend(vocab_file=folder + "/tokenizer.model", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=True)
else:
    tokenizer = LlamaTokenizer.from_pretrained(folder)
records = json.load(open(data))
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
          "to the user's questions.")


def ids_of(text):
    return [1] + tokenizer(text, add_special_tokens=False).input_ids


def preprocess(record):
    text = SYSTEM + " "
    for turn in record["conversations"]:
        text += f"USER: {turn['value']} " if turn["from"] == "human" else f"ASSISTANT: {turn['value']}</s>"
    ids = ids_of(text)
    labels = list(ids)
    at = 1
    labels[:at] = [-100] * at
    for round_ in text.split("</s>"):
        if not round_:
            break
        parts = round_.split(" ASSISTANT: ")
        length = len(ids_of(round_))
        instruction = len(ids_of(parts[0] + " ASSISTANT: ")) - 2
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
