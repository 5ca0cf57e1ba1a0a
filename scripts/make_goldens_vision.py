#!/usr/bin/env python3
"""Makes tests/golden/vision_*.safetensors: what transformers' CLIPVisionModel and SiglipVisionModel and the package
efficientnet-lite-pytorch compute.

    pip install torch transformers safetensors efficientnet-lite-pytorch
    scripts/make_goldens_vision.py
"""
import importlib.util
import pathlib

import numpy as np
import safetensors.torch
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
    path = GOLDEN / name
    safetensors.torch.save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
    print(path.relative_to(ROOT), path.stat().st_size, "bytes")


def make_clip() -> None:
    """Weights under the classic names, pixels, hidden states by layer, and gradients of sum(hidden[-2][:, 1:] * cotangent)."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=30, patch_size=7)
    out = {}
    pixels = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    normal = (pixels.float() / 255 - MEAN) / STD
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for act in ("quick_gelu", "gelu"):
        other = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act=act)).eval()
        other.load_state_dict(model.state_dict())
        hidden = other(normal, output_hidden_states=True).hidden_states
        assert len(hidden) == 4
        for layer, state in enumerate(hidden):
            out[f"{act}.hidden.{layer}"] = state
        if act == "gelu":
            continue
        cotangent = torch.randn(2, 16, 24)
        out["cotangent"] = cotangent
        (hidden[-2][:, 1:] * cotangent).sum().backward()
        for name, parameter in other.named_parameters():
            # Those behind the feature layer have none.
            if parameter.grad is not None and ("layers.0." in name or "embeddings" in name or "pre_" in name):
                out["grad." + classic(name)] = parameter.grad
    for name, tensor in model.state_dict().items():
        if not name.endswith("position_ids"):
            out["weights." + classic(name)] = tensor
    out["pixels"] = pixels
    save("vision_clip.safetensors", out)


def make_interpolated() -> None:
    """Of the tower of make_clip, pictures of other sizes than its own: hidden_states[-2] with interpolate_pos_encoding."""
    golden = safetensors.torch.load_file(GOLDEN / "vision_clip.safetensors")
    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
                                             image_size=30, patch_size=7)).eval()
    weights = {name.removeprefix("weights."): tensor for name, tensor in golden.items() if name.startswith("weights.")}
    model.load_state_dict({own: weights[classic(own)] for own in model.state_dict()})
    out = {}
    for size in (16, 49):
        pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
        normal = (pixels.float() / 255 - MEAN) / STD
        hidden = model(normal, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        out |= {f"pixels.{size}": pixels, f"hidden.{size}": hidden[-2]}
    save("vision_clip_sizes.safetensors", out)


def make_siglip() -> None:
    """As make_clip, of SigLIP; and hidden_states[-2] of pictures of another size with interpolate_pos_encoding."""
    torch.manual_seed(1)
    model = SiglipVisionModel(SiglipVisionConfig(hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=2,
                                                 image_size=30, patch_size=7)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    out = {"pixels": torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)}
    hidden = model((out["pixels"].float() / 255 - 0.5) / 0.5, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    for layer, state in enumerate(hidden):
        out[f"hidden.{layer}"] = state
    out["cotangent"] = torch.randn(2, 16, 20)
    (hidden[-2] * out["cotangent"]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ("layers.0." in name or "embeddings" in name):
            out["grad." + classic(name)] = parameter.grad
        out["weights." + classic(name)] = parameter
    out["large.pixels"] = torch.randint(0, 256, (1, 3, 43, 43), dtype=torch.uint8)
    out["large.hidden"] = model((out["large.pixels"].float() / 255 - 0.5) / 0.5, output_hidden_states=True,
                                interpolate_pos_encoding=True).hidden_states[-2]
    save("vision_siglip.safetensors", out)


def classic(name: str) -> str:
    return name if name.startswith("vision_model.") else "vision_model." + name


def formula(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [0, 1) that the C++ test makes too: no weights need to be stored."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(index << 32)
    i = (i ^ (i >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    i = (i ^ (i >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    i = i ^ (i >> np.uint64(31))
    return torch.from_numpy((i >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)).reshape(shape)


def make_efficientnet() -> None:
    """Features of the package's own Lite0 on formula weights: all of the first 16 channels, mean and deviation of the rest."""
    from efficientnet_lite_pytorch import EfficientNet

    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert_efficientnet_lite.py")
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    state = model.state_dict()
    by_our_name = {converter.rename(name): tensor for name, tensor in state.items() if converter.rename(name)}
    for index, (name, tensor) in enumerate(sorted(by_our_name.items())):
        u = formula(index, tuple(tensor.shape))
        if name.endswith("conv.weight"):
            tensor.copy_((2 * u - 1) * (6.0 / (tensor.numel() / tensor.shape[0])) ** 0.5)
        elif name.endswith(("norm.weight", "running_var")):
            tensor.copy_(0.5 + u)
        else:
            tensor.copy_(u - 0.5)
    pixels = (formula(1000, (1, 3, 224, 224)) * 256).to(torch.uint8)
    with torch.no_grad():
        features = model.extract_features((pixels.float() - 127) / 128)
    features = features.flatten(2).transpose(1, 2)[0]  # [49, 1280]
    save("vision_efficientnet_lite.safetensors",
         {"slice": features[:, :16], "mean": features.mean(1), "std": features.std(1)})
    print("share of zeros and sixes:", (features == 0).float().mean().item(), (features == 6).float().mean().item())


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        make_clip()
        make_interpolated()
        make_siglip()
    with torch.no_grad():
        make_efficientnet()
