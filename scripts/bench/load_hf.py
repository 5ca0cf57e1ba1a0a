#!/usr/bin/env python3
"""Pictures as transformers' users load them, as a contender of pair.py:  load_hf.py FOLDER slow|fast WORKERS
JPEG file -> PIL -> padded to a square -> CLIP's processor -> float32 batches of 16, by a DataLoader."""
import glob, json, sys, time

import torch, transformers
from PIL import Image

folder, kind, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = sorted(glob.glob(folder + "/*.jpg"))
size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
name = "CLIPImageProcessorPil" if kind == "slow" else "CLIPImageProcessor"
processor = getattr(transformers, name)(**size)
fill = tuple(int(mean * 255) for mean in processor.image_mean)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return len(files)

    def __getitem__(self, i):
        image = Image.open(files[i]).convert("RGB")
        side = max(image.size)
        if image.width != image.height:
            square = Image.new("RGB", (side, side), fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


loader = torch.utils.data.DataLoader(Pictures(), batch_size=16, num_workers=workers, persistent_workers=workers > 0,
                                     worker_init_fn=lambda _: torch.set_num_threads(1))
for _ in loader:
    pass
print("READY", flush=True)
for line in sys.stdin:
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch)
    print(json.dumps({"s": time.perf_counter() - start, "images": images}), flush=True)
