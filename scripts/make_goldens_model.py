#!/usr/bin/env python3
"""Makes tests/golden/{llama,mistral,qwen2,qwen3}_*.safetensors: tiny random decoders, what transformers computes with them in
float32 (logits, loss, gradients), and tests/golden/rope.json, its rotary frequencies.

    python scripts/make_goldens_model.py
"""
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
SHAPE = dict(vocab_size=101, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=2.5)
LLAMA, MISTRAL, QWEN2, QWEN3 = ((LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM),
                                (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM))
VARIANTS = {
    "tied": dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama3": dict(tie_word_embeddings=False, rope_parameters=dict(rope_theta=500.0, **LLAMA3)),
    "linear": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
                   rope_parameters=dict(rope_theta=10000.0, **LINEAR)),
}
# Windows shorter than the samples; heads whose width is not D / H; grouped queries; biases; the gradient of every parameter.
SMALL = dict(vocab_size=61, hidden_size=26, intermediate_size=34, num_hidden_layers=2, num_attention_heads=6,
             max_position_embeddings=64, rms_norm_eps=1e-6)
FAMILIES = {
    "mistral_window": (MISTRAL, dict(num_key_value_heads=3, head_dim=6, sliding_window=5, rope_parameters=dict(rope_type="default",
                                                                                                rope_theta=1000.0))),
    "qwen2_tied": (QWEN2, dict(num_key_value_heads=2, head_dim=6, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16))),
    "qwen2_window": (QWEN2, dict(num_key_value_heads=1, head_dim=4, use_sliding_window=True, sliding_window=6, max_window_layers=1,
                                 rope_parameters=dict(rope_type="default", rope_theta=1e4))),
    "qwen3_bias": (QWEN3, dict(num_key_value_heads=2, head_dim=10, attention_bias=True, rope_parameters=dict(rope_type="default",
                                                                                                rope_theta=1e6))),
    "qwen3_tied": (QWEN3, dict(num_key_value_heads=6, head_dim=8, tie_word_embeddings=True, rope_parameters=dict(
        rope_theta=500.0, **LLAMA3))),
}
LENGTHS = (9, 14)
GRADIENTS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
             "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight",
             "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight",
             "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight",
             "model.layers.1.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight",
             "model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.bias")


def golden(name, family, options, gradients=None):
    torch.manual_seed(0)
    config = family[0](**options)
    model = family[1](config).float()
    for parameter in model.parameters():  # HF's initialisation would leave nearly uniform outputs and zero biases
        torch.nn.init.normal_(parameter, std=0.25 if parameter.dim() > 1 else 0.5)
    tensors = {key: value for key, value in model.state_dict().items()
               if not (config.tie_word_embeddings and key == "lm_head.weight")}
    out, loss = {}, 0
    supervised, targets, logits, offset = [], [], [], 0
    for length in LENGTHS:
        ids = torch.randint(0, config.vocab_size, (length,))
        result = model(input_ids=ids[None]).logits[0]
        rows = torch.arange(length // 3, length - 1)
        loss = loss + torch.nn.functional.cross_entropy(result[rows], ids[rows + 1], reduction="sum")
        supervised.append(rows + offset)
        targets.append(ids[rows + 1])
        logits.append(result.detach())
        out.setdefault("ids", []).append(ids)
        offset += length
    loss.backward()
    tensors |= {"golden.ids": torch.cat(out["ids"]), "golden.logits": torch.cat(logits), "golden.loss": loss.detach(),
                "golden.supervised": torch.cat(supervised), "golden.targets": torch.cat(targets)}
    for key, parameter in model.named_parameters():
        if gradients is None or key in gradients:
            tensors["golden.grad." + key] = parameter.grad
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, GOLDEN / f"{name}.safetensors", {"config": json.dumps(config.to_dict())})


def rope_goldens():
    cases = []
    for parameters in (dict(rope_type="default", rope_theta=10000.0), dict(rope_theta=500000.0, **LLAMA3),
                       dict(rope_theta=10000.0, **LINEAR),
                       dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=512),
                       dict(rope_type="yarn", rope_theta=1e6, factor=8.0, original_max_position_embeddings=1024,
                            beta_fast=16.0, beta_slow=2.0, attention_factor=1.25)):
        config = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=2048,
                             rope_parameters=dict(parameters))
        if parameters["rope_type"] == "default":
            inv_freq, scaling = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64)), 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
        cases.append(dict(rope_parameters=parameters, head_dim=64, max_position_embeddings=2048,
                          inv_freq=[float(x) for x in inv_freq], attention_scaling=float(scaling)))
    (GOLDEN / "rope.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for variant, variant_options in VARIANTS.items():
        golden(f"llama_{variant}", LLAMA, SHAPE | variant_options, GRADIENTS)
    for variant, (family, variant_options) in FAMILIES.items():
        golden(variant, family, SMALL | variant_options)
    rope_goldens()
