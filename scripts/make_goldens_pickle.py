#!/usr/bin/env python3
"""Makes tests/golden/torch_pickle*: files as torch.save writes them, and the tensors in them as safetensors.

    pip install torch safetensors
    scripts/make_goldens_pickle.py
"""
import collections
import pathlib

import safetensors.torch
import torch

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"


def main() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    base = torch.randn(4, 6)
    tensors = collections.OrderedDict(linear.state_dict(keep_vars=True))  # Parameters, and a _metadata attribute
    tensors._metadata = linear.state_dict()._metadata
    tensors |= {"transposed": base.t(), "slice": base[1:3, ::2], "same_storage": base, "scalar": torch.tensor(2.5),
                "empty": torch.empty(0, 3), "expanded": torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 3)}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors[str(dtype)] = torch.randn(3).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        tensors[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    for i in range(300):  # more than 256 things to refer to, which takes the longer instructions
        tensors[f"many.{i}"] = torch.tensor([i])
    assert "_metadata" in vars(tensors)
    torch.save(tensors, GOLDEN / "torch_pickle.bin")
    torch.save({"a": torch.ones(2)}, GOLDEN / "torch_pickle_old.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), GOLDEN / "torch_pickle_module.bin")  # a class of its own, not a dictionary
    safetensors.torch.save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()},
                                GOLDEN / "torch_pickle.safetensors")
    for path in sorted(GOLDEN.glob("torch_pickle*")):
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
