#!/usr/bin/env python3
"""Random whole LLaVAs of odd sizes: every tower with every decoder family. What transformers computes with them (logits, loss, the
gradient of every parameter, in float32; logits in bfloat16), for the test model/llava_live to compare with. Usage: llavas.py FOLDER [SEED]"""
import pathlib, random, sys

import torch
from safetensors.torch import save_file
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig, Qwen2Config,
                          Qwen3Config, SiglipVisionConfig)

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
NORMS = {"clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)), "siglip": ((0.5,) * 3, (0.5,) * 3)}
IMAGE_TOKEN = 3


def random_llava(tower, decoder):
    heads, blocks, patch = rng.randint(1, 4), rng.randint(2, 4), rng.choice([5, 7, 8])
    sizes = dict(hidden_size=heads * rng.randint(3, 9), intermediate_size=rng.randint(7, 60), num_hidden_layers=blocks,
                 num_attention_heads=heads, patch_size=patch, image_size=patch * rng.randint(2, 4) + rng.randint(0, 3))
    if tower == "clip":
        vision = CLIPVisionConfig(**sizes, hidden_act=rng.choice(["quick_gelu", "gelu"]), projection_dim=8)
    else:
        vision = SiglipVisionConfig(**sizes)
    kv_heads, group, head_dim = rng.randint(1, 3), rng.randint(1, 3), 2 * rng.randint(2, 6)
    options = dict(vocab_size=rng.randint(40, 90), hidden_size=kv_heads * group * head_dim, intermediate_size=rng.randint(9, 60),
                   num_hidden_layers=rng.randint(1, 3), num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads,
                   max_position_embeddings=256, tie_word_embeddings=rng.random() < 0.3, bos_token_id=1, eos_token_id=2)
    if decoder is Qwen3Config:
        options["head_dim"] = head_dim + 2
    text = decoder(**options)
    layer = rng.choice([-1, -2, 1, blocks])
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=layer,
                       vision_feature_select_strategy=rng.choice(["default", "full"]) if tower == "clip" else "full",
                       tie_word_embeddings=options["tie_word_embeddings"])


def samples(config):
    """Ids with 0, 1 or 2 pictures a sample, expanded to their tokens, and the pictures."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tokens = side * side + (config.vision_feature_select_strategy == "full" and "clip" in vision.model_type)
    rows = []
    for pictures in (1, 0, 2):
        ids = []
        for _ in range(pictures):
            ids += [rng.randrange(4, config.text_config.vocab_size) for _ in range(rng.randint(1, 4))] + [IMAGE_TOKEN] * tokens
        ids += [rng.randrange(4, config.text_config.vocab_size) for _ in range(rng.randint(4, 9))]
        pixels = torch.randint(0, 256, (pictures, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
        rows.append((torch.tensor(ids), pixels))
    return rows


def forward(model, ids, pixels, norm):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in norm)
    images = (pixels.float() / 255 - mean) / std
    dtype = next(model.parameters()).dtype
    return model(input_ids=ids[None], pixel_values=images.to(dtype) if len(pixels) else None).logits[0].float()


count = 0
for tower in NORMS:
    for decoder in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config):
        torch.manual_seed(rng.randrange(1 << 30))
        config = random_llava(tower, decoder)
        model = LlavaForConditionalGeneration(config).float().eval()
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.2)
        place = folder / f"{tower}_{config.text_config.model_type}"
        model.save_pretrained(place)
        rows, loss, logits, supervised, targets, offset = samples(config), 0, [], [], [], 0
        for ids, pixels in rows:
            result = forward(model, ids, pixels, NORMS[tower])
            learned = torch.tensor([i for i in range(len(ids) - 1) if ids[i + 1] != IMAGE_TOKEN])
            loss = loss + torch.nn.functional.cross_entropy(result[learned], ids[learned + 1], reduction="sum")
            logits.append(result.detach())
            supervised.append(learned + offset)
            targets.append(ids[learned + 1])
            offset += len(ids)
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        half = model.to(torch.bfloat16)
        with torch.no_grad():
            logits_bf16 = torch.cat([forward(half, ids, pixels, NORMS[tower]) for ids, pixels in rows])
        all_ids = torch.cat([ids for ids, _ in rows])
        expected = {"ids": all_ids, "lengths": torch.tensor([len(ids) for ids, _ in rows]), "pixels": torch.cat([p for _, p in rows]),
                    "image_rows": (all_ids == IMAGE_TOKEN).nonzero()[:, 0], "supervised": torch.cat(supervised),
                    "targets": torch.cat(targets), "loss": loss.detach(), "logits": torch.cat(logits), "logits_bf16": logits_bf16}
        save_file({name: value.contiguous() for name, value in expected.items()}, place / "expected")
        save_file({name: value.contiguous() for name, value in gradients.items()}, place / "gradients")
        count += 1
print(f"{count} whole models")
