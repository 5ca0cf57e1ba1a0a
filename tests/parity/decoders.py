#!/usr/bin/env python3
"""Random decoders of odd sizes, every family with every option it has: what transformers computes with them (logits, loss, the gradient
of every parameter, in float32; logits in bfloat16), for the test model/decoder_live to compare with. Each is written as transformers
saves it and, where llama.cpp has it, as a GGUF file with the names and the order of its converter. Usage: decoders.py FOLDER [SEED]"""
import json, pathlib, random, sys

import gguf, numpy, torch
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
MODELS_EACH = 6


def random_rope():
    theta = rng.choice([500.0, 1e4, 1e6])
    return rng.choice([
        dict(rope_type="default", rope_theta=theta), dict(rope_type="linear", rope_theta=theta, factor=rng.uniform(1.5, 4)),
        dict(rope_type="llama3", rope_theta=theta, factor=rng.choice([2.0, 8.0]), low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=rng.choice([8, 32])),
        dict(rope_type="yarn", rope_theta=theta, factor=rng.choice([2.0, 4.0]), original_max_position_embeddings=32)])


LLAMA3_PUBLISHED = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=8192)


def random_config(family, index):
    kv_heads, group, head_dim = rng.randint(1, 3), rng.randint(1, 3), 2 * rng.randint(1, 9)
    heads = kv_heads * group
    own_width = family == "qwen2"  # its heads share the model's width
    options = dict(vocab_size=rng.randint(40, 130), hidden_size=heads * (head_dim if own_width else rng.randint(3, 14)),
                   intermediate_size=rng.randint(5, 90), num_hidden_layers=rng.randint(1, 3), num_attention_heads=heads,
                   num_key_value_heads=kv_heads, max_position_embeddings=16384, rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-3]),
                   tie_word_embeddings=rng.random() < 0.5, rope_parameters=random_rope(), bos_token_id=1, eos_token_id=2)
    if not own_width:
        options["head_dim"] = head_dim
    if family == "llama":
        options |= dict(attention_bias=rng.random() < 0.5, mlp_bias=index > 0 and rng.random() < 0.5)
        if index == 0:
            options |= dict(head_dim=18, rope_parameters=LLAMA3_PUBLISHED)
    if family == "qwen3":
        options |= dict(attention_bias=rng.random() < 0.5)
    if family == "mistral":
        options |= dict(sliding_window=rng.choice([None, 3, 8, 100]))
    elif family != "llama" and rng.random() < 0.5:
        options |= dict(use_sliding_window=True, sliding_window=rng.randint(2, 9), max_window_layers=rng.randint(0, 2))
    return FAMILIES[family][0](**options)


def compute(model, lengths):
    out, loss = {"ids": [], "logits": [], "supervised": [], "targets": []}, 0
    offset = 0
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (length,))
        logits = model(input_ids=ids[None]).logits[0]
        rows = torch.arange(length // 3, length - 1)
        loss = loss + torch.nn.functional.cross_entropy(logits[rows], ids[rows + 1], reduction="sum")
        for key, value in (("ids", ids), ("logits", logits.detach()), ("supervised", rows + offset), ("targets", ids[rows + 1])):
            out[key].append(value)
        offset += length
    loss.backward()
    tensors = {key: torch.cat(value) for key, value in out.items()} | {"loss": loss.detach(), "lengths": torch.tensor(lengths)}
    tensors |= {"grad." + name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    half = model.to(torch.bfloat16)
    with torch.no_grad():
        tensors["logits_bf16"] = torch.cat([half(input_ids=ids[None]).logits[0].float() for ids in out["ids"]])
    return {name: value.contiguous() for name, value in tensors.items()}


def permute(rows, heads):
    """HF's order of rotary rows to llama.cpp's, as convert_hf_to_gguf.py does it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model, path):
    config, rope = model.config, model.config.rope_parameters
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = permute(array, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), numpy.ascontiguousarray(array))
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


for family in FAMILIES:
    for index in range(MODELS_EACH):
        torch.manual_seed(rng.randrange(1 << 30))
        config = random_config(family, index)
        model = FAMILIES[family][1](config).float()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25 if parameter.dim() > 1 else 0.5)
        place = folder / f"{family}_{index}"
        model.save_pretrained(place)
        # llama.cpp has no window for these; of "llama3" the published settings alone can be told from a file's rope_freqs.
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or []) or (family == "mistral" and config.sliding_window)
        biased = family == "qwen3" and config.attention_bias or family == "llama" and config.mlp_bias
        rope = config.rope_parameters
        told = rope["rope_type"] != "llama3" or rope == LLAMA3_PUBLISHED
        if not slides and not biased and told:
            write_gguf(model, place / "model.gguf")
        save_file(compute(model, [rng.randint(2, 30) for _ in range(rng.randint(1, 3))]), place / "expected.safetensors")
print(f"{len(FAMILIES) * MODELS_EACH} decoders, {len(list(folder.glob('*/model.gguf')))} of them as GGUF too")
