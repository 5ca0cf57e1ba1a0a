#!/usr/bin/env python3
"""The GGUF files that Caldera writes, judged by llama.cpp's own Python package (gguf): it reads them, and every tensor is what its
own quantiser makes of the weights in a Hugging Face folder of the same model.

    tests/parity/gguf_files.py CALDERA [MODEL]

Without a model (LLaMA-shaped, CLIP or SigLIP): random ones."""
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import safetensors.torch
import torch

import random_llava

TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
         "bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
              "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def check_types(reader: gguf.GGUFReader, architecture: str, expected: dict) -> dict:
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == architecture
    for key, value in expected.items():
        assert fields[key] == value, (key, fields.get(key), value)
    return fields


def check(tensor: gguf.ReaderTensor, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if values.ndim == 1:
        kind = TYPES["f32"]
    if kind == TYPES["q8_0"] and values.shape[-1] % 32 != 0:
        kind = TYPES["f16"]
    assert tensor.tensor_type == kind, (tensor.name, tensor.tensor_type, kind)
    assert list(tensor.shape) == list(reversed(values.shape)), (tensor.name, tensor.shape, values.shape)
    expected = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    assert tensor.data.tobytes() == expected.tobytes(), f"{tensor.name}: not the bytes of the gguf package"


def check_model(caldera: str, model: pathlib.Path) -> None:
    work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_gguf_"))

    def export(form: str, dtype: str) -> pathlib.Path:
        subprocess.run([caldera, "export", "--model", model, "--format", form, "--dtype", dtype, "--out",
                        work / f"{form}-{dtype}"], check=True, stderr=subprocess.DEVNULL)
        return work / f"{form}-{dtype}"

    hf = safetensors.torch.load_file(export("hf", "f32") / "model.safetensors")
    hf = {name: value.float().numpy() for name, value in hf.items()}
    for dtype, kind in TYPES.items():
        folder = export("gguf", dtype)
        reader = gguf.GGUFReader(folder / f"model-{dtype}.gguf")
        fields = check_types(reader, "llama", {"general.type": "model", "general.file_type": FILE_TYPES[dtype],
                                               "general.quantization_version": gguf.GGML_QUANT_VERSION})
        blocks, width = fields["llama.block_count"], fields["llama.embedding_length"]
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        rows = len(fields["tokenizer.ggml.tokens"])
        assert rows == fields["llama.vocab_size"] == len(fields["tokenizer.ggml.token_type"])
        assert tensors["token_embd.weight"].shape.tolist() == [width, rows]
        count = 0
        for name, values in hf.items():
            if not name.startswith("language_model."):
                continue
            name = name.removeprefix("language_model.")
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                values = values[:rows]  # the folder's vocabulary is padded for <image>
            if ".q_proj." in name:
                values = permute(values, fields["llama.attention.head_count"])
            if ".k_proj." in name:
                values = permute(values, fields["llama.attention.head_count_kv"])
            check(tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))], values, kind)
            count += 1
        assert count == len(tensors), (count, len(tensors))

        reader = gguf.GGUFReader(folder / f"mmproj-{dtype}.gguf")
        fields = check_types(reader, "clip", {"general.type": "mmproj", "clip.projector_type": "mlp",
                                              "clip.has_vision_encoder": True})
        blocks = fields["clip.vision.block_count"]
        assert fields["clip.vision.feature_layer"] == [blocks]
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        count = 0
        for name, values in hf.items():
            if name.startswith("multi_modal_projector."):
                target = name.replace("multi_modal_projector.linear_1", "mm.0").replace(
                    "multi_modal_projector.linear_2", "mm.2")
            elif name.startswith("vision_tower."):
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None or target.startswith("v.post_ln"):
                    continue  # the blocks beyond the feature layer, the norm behind them
            else:
                continue
            wanted = kind
            if target == "v.position_embd.weight":
                wanted = TYPES["f32"]
            elif target == "v.patch_embd.weight":
                wanted = TYPES["f16"] if dtype == "f16" else TYPES["f32"]
            check(tensors[target], values, wanted)
            count += 1
        assert count == len(tensors), (count, len(tensors))
        print(f"{model.name}, {dtype}: {sum(p.stat().st_size for p in folder.glob('*.gguf')):,} bytes, every tensor the gguf package's own")


def main() -> None:
    torch.set_num_threads(1)
    caldera = sys.argv[1]
    if len(sys.argv) > 2:
        return check_model(caldera, pathlib.Path(sys.argv[2]))
    work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_gguf_models_"))
    random_llava.make(work / "clip")
    random_llava.make(work / "clip_tied_biased", tied=True, attention_bias=True, mlp_bias=True)
    random_llava.make(work / "siglip", tower="siglip")
    for folder in sorted(work.iterdir()):
        check_model(caldera, folder)


if __name__ == "__main__":
    main()
