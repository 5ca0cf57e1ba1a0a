#!/usr/bin/env python3
"""What `caldera export` writes for others is what they read: --format hf in shards by transformers (model, processor, generation
configuration, every tensor bit for bit), --format llava by its names and by torch.load(weights_only=True).

    tests/parity/exports.py CALDERA"""
import json
import pathlib
import subprocess
import sys
import tempfile

import safetensors.torch
import torch
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

import random_llava

LLAVA_NAMES = (("language_model.", ""), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
               ("multi_modal_projector.linear_2", "model.mm_projector.2"), ("vision_tower.", "model.vision_tower.vision_tower."))


def llava_name(name: str) -> str:
    return next(new + name.removeprefix(old) for old, new in LLAVA_NAMES if name.startswith(old))


def main() -> None:
    torch.set_num_threads(1)
    caldera = sys.argv[1]
    work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_exports_"))
    reference = random_llava.make(work / "model").state_dict()

    def export(folder: str, *arguments) -> pathlib.Path:
        subprocess.run([caldera, "export", "--model", work / "model", "--template", "v1", "--out", work / folder,
                        *map(str, arguments)], check=True, stderr=subprocess.DEVNULL)
        return work / folder

    for dtype, torch_dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        folder = export(f"hf-{dtype}", "--format", "hf", "--dtype", dtype, "--max-shard-size", "200KB")
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(shards) > 3 and set(index["weight_map"].values()) == {path.name for path in shards}
        # A tensor larger than a shard has one of its own.
        for path in shards:
            assert path.stat().st_size < 220_000 or len(safetensors.torch.load_file(path)) == 1, path
        model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch_dtype, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        state = model.state_dict()
        assert state.keys() == reference.keys()
        for name, value in reference.items():
            assert torch.equal(state[name], value.to(torch_dtype)), name
        assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
        readme = (folder / "README.md").read_text()
        assert readme.startswith("---\nlibrary_name: transformers\n") and "pipeline_tag: image-text-to-text" in readme
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
                                         add_generation_prompt=True)
    assert text.endswith("USER: <image>\nWhat? ASSISTANT:"), text
    print(f"hf: {len(shards)} shards, every tensor bit for bit in three types, processor and chat template load")

    hf = {}
    for path in (work / "hf-f32").glob("*.safetensors"):
        hf |= safetensors.torch.load_file(path)
    folder = export("llava", "--format", "llava", "--mm-vision-tower", "openai/clip-vit-large-patch14-336")
    written = safetensors.torch.load_file(folder / "model.safetensors")
    assert written.keys() == {llava_name(name) for name in hf}
    for name, value in hf.items():
        assert torch.equal(written[llava_name(name)], value), name
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336" and config["mm_hidden_size"] == 64
    for dtype, torch_dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        file = export(f"projector-{dtype}", "--format", "llava", "--part", "projector", "--dtype", dtype) / "mm_projector.bin"
        for mmap in (False, True):
            projector = torch.load(file, weights_only=True, mmap=mmap)
            assert projector.keys() == {llava_name(name) for name in hf if "projector" in name}
            for name, value in projector.items():
                assert torch.equal(value, written[name].to(torch_dtype)), name
    print(f"llava: {len(written)} tensors under LLaVA's names; torch.load reads mm_projector.bin, mapped as well")


if __name__ == "__main__":
    main()
