#!/usr/bin/env python3
"""What transformers makes of a llama's GGUF file, for Caldera's reader to be held against:

    tests/parity/gguf_nll.py MODEL.gguf OUT.safetensors
    CALDERA_GGUF=MODEL.gguf CALDERA_GGUF_EXPECTED=OUT.safetensors build/model_tests --gtest_filter='*RealModel'

Writes the ids of a passage and the loss of each next token, in nats, in float32."""
import sys

import safetensors.torch
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

PASSAGE = ("The old lighthouse stood at the edge of the cliff. Every evening the keeper climbed its narrow stairs, lit the "
           "lamp and looked out over the sea. Ships from distant countries passed in the night, and their captains knew "
           "that the light meant rocks below. When the storm came, nobody slept.")


def main() -> None:
    torch.set_num_threads(1)
    folder, _, file = sys.argv[1].rpartition("/")
    tokenizer = AutoTokenizer.from_pretrained(folder or ".", gguf_file=file)
    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(sys.argv[1])["config"])).eval()
    weights = load_gguf_checkpoint(sys.argv[1], return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict({k: torch.as_tensor(v).float() for k, v in weights.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    ids = torch.tensor(tokenizer(PASSAGE)["input_ids"])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    print(f"{len(ids)} tokens, perplexity {nll.mean().exp():.4f}")
    safetensors.torch.save_file({"ids": ids, "nll": nll}, sys.argv[2])


if __name__ == "__main__":
    main()
