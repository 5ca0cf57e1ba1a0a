#!/usr/bin/env python3
"""Makes tests/golden/llama_tiny.gguf, a small llama in every tensor type that Caldera reads, written with llama.cpp's own
package, and llama_tiny_expected.safetensors, the same weights as transformers' GGUF reader gives them to LlamaForCausalLM.

    pip install torch transformers safetensors gguf
    scripts/make_goldens_gguf.py
"""
import json
import pathlib

import gguf
import numpy as np
import safetensors.torch
import torch
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
WIDTH, MLP, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 40
TYPES = gguf.GGMLQuantizationType


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """HF's order of rotary rows to llama.cpp's, as its convert_hf_to_gguf.py does it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def main() -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(GOLDEN / "llama_tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, shape: tuple[int, ...], kind: TYPES) -> None:
        values = rng.standard_normal(shape).astype(np.float32) * 0.2
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = permute(values, HEADS if "attn_q" in name else KV_HEADS)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCAB, WIDTH), TYPES.Q8_0)
    for i in range(LAYERS):
        kinds = [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0] if i == 0 else [TYPES.F16, TYPES.BF16, TYPES.F32]
        add(f"blk.{i}.attn_norm.weight", (WIDTH,), TYPES.F32)
        add(f"blk.{i}.attn_q.weight", (WIDTH, WIDTH), kinds[0])
        add(f"blk.{i}.attn_k.weight", (WIDTH // 2, WIDTH), kinds[1])
        add(f"blk.{i}.attn_v.weight", (WIDTH // 2, WIDTH), kinds[2])
        add(f"blk.{i}.attn_output.weight", (WIDTH, WIDTH), kinds[0])
        add(f"blk.{i}.ffn_norm.weight", (WIDTH,), TYPES.F32)
        add(f"blk.{i}.ffn_gate.weight", (MLP, WIDTH), kinds[1])
        add(f"blk.{i}.ffn_up.weight", (MLP, WIDTH), kinds[2])
        add(f"blk.{i}.ffn_down.weight", (WIDTH, MLP), kinds[0])
    add("output_norm.weight", (WIDTH,), TYPES.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                         num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=128, rms_norm_eps=1e-5,
                         rope_theta=12345.0, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    read = load_gguf_checkpoint(GOLDEN / "llama_tiny.gguf", return_tensors=True, model_to_load=model)
    print(json.dumps(read["config"], default=str))
    state = {name: torch.as_tensor(value).float().contiguous() for name, value in read["tensors"].items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    # Half of each tensor is enough, and keeps the file small.
    out = {name: (value[: (value.shape[0] + 1) // 2] if value.dim() == 2 else value).clone() for name, value in state.items()}
    ids = torch.tensor([[1, 7, 30, 22, 5, 39, 0, 12]])
    with torch.no_grad():
        out["logits"] = model(ids).logits[0]
    out["ids"] = ids[0]
    safetensors.torch.save_file(out, GOLDEN / "llama_tiny_expected.safetensors")
    for path in GOLDEN.glob("llama_tiny*"):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
