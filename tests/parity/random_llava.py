"""A LLaVA of odd sizes with random weights as transformers saves it, with the tokenizer of checkpoints/scenes: for the checks beside this
file."""
import pathlib
import shutil

import torch
from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, SiglipImageProcessor, SiglipVisionConfig)

TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "checkpoints/scenes/language_model"
IMAGE_TOKEN, VOCABULARY = 640, 641  # the tokenizer's 640 pieces and <image>: generation gives no id without a token
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=44, patch_size=11)


def make(folder: pathlib.Path, tower: str = "clip", tied: bool = False, **text) -> LlavaForConditionalGeneration:
    text_config = LlamaConfig(**{**dict(hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
                                        num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=512,
                                        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2), **text})
    vision_config = CLIPVisionConfig(projection_dim=40, **TOWER) if tower == "clip" else SiglipVisionConfig(**TOWER)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        text_config=text_config, vision_config=vision_config, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full", tie_word_embeddings=tied))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.12)
    model.tie_weights()
    model.eval().save_pretrained(folder)
    size = TOWER["image_size"]
    processor = (CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}) if tower == "clip"
                 else SiglipImageProcessor(size={"height": size, "width": size}))
    processor.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return model
