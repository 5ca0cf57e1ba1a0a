#!/usr/bin/env python3
"""Layer by layer: the activations that `caldera score --taps` writes are transformers' own, for random models with a CLIP and with a
SigLIP tower (float32, relative to each activation's largest value).

    tests/parity/taps.py CALDERA [MODEL DATA.json IMAGES]

With a model folder that transformers loads: that model, on the first sample of the data."""
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import random_llava

BOUND = 1e-5


def hooked(model, taps: dict) -> None:
    """Records what the names of model/taps.h stand for in transformers."""
    def keep(name):
        def hook(_, __, output):
            value = output[0] if isinstance(output, tuple) else output
            taps[name] = value.detach()
        return hook

    tower, language = model.model.vision_tower, model.model.language_model
    tower = getattr(tower, "vision_model", tower)
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(keep(f"vision_tower.layers.{i}"))
    (tower.pre_layrnorm if hasattr(tower, "pre_layrnorm") else tower.embeddings).register_forward_hook(keep("vision_tower.embeddings"))
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: taps.__setitem__("vision_tower", inputs[0].detach()))
    model.model.multi_modal_projector.register_forward_hook(keep("multi_modal_projector"))
    language.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: taps.__setitem__("language_model.embeddings", (args or kwargs["hidden_states"])[0].detach()),
        with_kwargs=True)
    for i, layer in enumerate(language.layers):
        layer.register_forward_hook(keep(f"language_model.layers.{i}"))
    language.norm.register_forward_hook(keep("language_model.norm"))


def compare(caldera: str, folder: pathlib.Path, data: pathlib.Path, images: pathlib.Path, work: pathlib.Path) -> None:
    file = work / "taps.safetensors"
    subprocess.run([caldera, "score", "--model", folder, "--data", data, "--images", images, "--template", "v1", "--dtype", "float32",
                    "--out", work / "score.jsonl", "--taps", file], check=True, stderr=subprocess.DEVNULL)
    ours = safetensors.torch.load_file(file)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(processor[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    ids = ours["input_ids"]
    theirs: dict = {}
    hooked(model, theirs)
    with torch.no_grad():
        output = model(input_ids=torch.where(ids == -200, model.config.image_token_index, ids)[None],
                       pixel_values=(ours["pixels"].float() / 255 - mean) / std,
                       attention_mask=torch.ones_like(ids)[None])
    theirs["logits"] = output.logits
    names = [name for name in ours if name not in ("input_ids", "position_ids", "cu_seqlens", "pixels")]
    assert len(names) >= 8
    worst = ("", 0.0)
    for name in names:
        expected = theirs[name].reshape(-1, theirs[name].shape[-1])[:, : ours[name].shape[-1]]  # a padded vocabulary is longer
        difference = (ours[name].reshape(expected.shape) - expected).abs().max() / expected.abs().max()
        worst = max(worst, (name, float(difference)), key=lambda item: item[1])
        if len(sys.argv) > 2:
            print(f"  {name}: {difference:.1e}")
    print(f"{folder.name}: {len(names)} activations, the worst is {worst[0]}: {worst[1]:.1e}")
    assert worst[1] < BOUND, "not transformers' activations"


def main() -> None:
    torch.set_num_threads(1)
    caldera = sys.argv[1]
    work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_taps_"))
    if len(sys.argv) > 2:
        return compare(caldera, *map(pathlib.Path, sys.argv[2:5]), work)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(work / "0.png")
    (work / "data.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is in the top left?"}, {"from": "gpt", "value": "a red star"}]}]))
    for tower in ("clip", "siglip"):
        random_llava.make(work / tower, tower)
        compare(caldera, work / tower, work / "data.json", work, work)


if __name__ == "__main__":
    main()
