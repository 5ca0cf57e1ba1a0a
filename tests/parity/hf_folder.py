#!/usr/bin/env python3
"""Judges a folder that Caldera wrote by transformers: every tensor is expected and none is missing; with --batch, its logits are
Caldera's.

    tests/parity/hf_folder.py DIR [--batch FILE.safetensors]

FILE holds input_ids [samples, tokens] (-200 where an image's features go), pixels [images, 3, Y, X] uint8 and Caldera's
logits [samples, tokens, vocabulary] (of the rows in training: those that only pad the file are left out). CALDERA_PARITY_DIR=DIR build/model_tests --gtest_filter=ExportTest.* writes such a folder, with
DIR/batch.safetensors."""
import argparse
import json
import pathlib

import safetensors.torch
import torch
from transformers import AutoConfig, CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

IMAGE_TOKEN_INDEX = -200


def load(kind, folder: pathlib.Path):
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], f"{folder}: {problem}: {sorted(info[problem])[:5]}"
    print(f"{folder}: loads; {sum(p.numel() for p in model.parameters()):,} parameters")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--batch", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    model = load(LlavaForConditionalGeneration, args.dir)
    config = AutoConfig.from_pretrained(args.dir)
    assert config.model_type == "llava" and config.image_token_index < config.text_config.vocab_size
    for part, kind in (("vision_tower", CLIPVisionModel), ("language_model", LlamaForCausalLM)):
        if (args.dir / part).is_dir():
            load(kind, args.dir / part)
    if args.batch is None:
        return

    batch = safetensors.torch.load_file(args.batch)
    processor = json.loads((args.dir / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(processor[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    pixels = (batch["pixels"].float() * processor["rescale_factor"] - mean) / std
    ids = torch.where(batch["input_ids"] == IMAGE_TOKEN_INDEX, config.image_token_index, batch["input_ids"])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    expected = expected[..., : batch["logits"].shape[-1]]
    difference = (expected - batch["logits"]).abs().max() / expected.abs().max()
    print(f"logits {list(expected.shape)}: relative difference {difference:.2e}")
    assert difference < 1e-4, "the logits are not transformers'"


if __name__ == "__main__":
    main()
