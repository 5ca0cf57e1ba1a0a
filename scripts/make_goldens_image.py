#!/usr/bin/env python3
"""Writes tests/golden/image: what PIL and CLIPImageProcessor make of small pictures, for tests/data/image_test.cpp.

Needs Pillow, numpy and transformers. Each case of decoding is NAME.EXT with NAME.rgb (height * width * 3 bytes) beside it;
resize.bin and preprocess.bin hold only results: their inputs are noise(height, width), which the test makes itself.
"""
import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/image"
MEAN = (0.48145466, 0.4578275, 0.40821073)


def noise(height, width):
    """Noise from a linear congruential generator: the hardest case for rounding and clipping."""
    state, values = 12345, bytearray()
    for _ in range(height * width * 3):
        state = (state * 1103515245 + 12345) % 2**32
        values.append(state >> 24)
    return Image.frombytes("RGB", (width, height), bytes(values))


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x * 7 + y * 5) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGB")


def png16(height, width, color_type, channels):
    """A 16-bit PNG, which PIL reads but does not write."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 700, (height, width * channels)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gif_small_frame(image):
    """A first frame that does not cover the screen, with a palette of its own; the screen's transparent index is 3."""
    inner = image.crop((0, 0, 13, 9)).quantize(8)
    data = encode(inner, "GIF")
    body = data[data.index(b"\x2c", 13 + 3 * 8) + 10:-1]  # minimum code size, blocks
    screen = b"GIF89a" + struct.pack("<HHBBB", image.width, image.height, 0x80 | 2, 0, 0) + bytes(range(24))
    frame = b"\x2c" + struct.pack("<HHHHB", 7, 4, 13, 9, 0x80 | 2) + bytes(inner.getpalette()[:24])
    return screen + b"\x21\xf9\x04\x01\0\0\x03\0" + frame + body + b"\x3b"


def decode_cases():
    image = smooth(18, 24)
    alpha = np.asarray(image.convert("L"))
    rgba = Image.fromarray(np.dstack([np.asarray(image), alpha]), "RGBA")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    palette = image.quantize(16)
    cases = {
        "rgb.jpg": encode(image, "JPEG", quality=90),
        "rotated.jpg": encode(image, "JPEG", exif=rotated),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "rgb.png": encode(image, "PNG"),
        "grey.png": encode(image.convert("L"), "PNG"),
        "bits.png": encode(image.convert("1"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette_alpha.png": encode(palette, "PNG", transparency=3),
        "rgba.png": encode(rgba, "PNG"),
        "grey_alpha.png": encode(rgba.convert("LA"), "PNG"),
        "grey16.png": png16(18, 24, 0, 1),
        "rgb16.png": png16(18, 24, 2, 3),
        "rgba16.png": png16(18, 24, 6, 4),
        "lossy.webp": encode(image, "WEBP", quality=80),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "alpha.webp": encode(rgba, "WEBP", quality=80),
        "rgb.bmp": encode(image, "BMP"),
        "palette.bmp": encode(palette, "BMP"),
        "rgb.tiff": encode(image, "TIFF"),
        "palette.gif": encode(palette, "GIF", interlace=0),
        "interlaced.gif": encode(image.quantize(200), "GIF", interlace=1),
        "grey.gif": encode(image.convert("L"), "GIF"),
        "transparent.gif": encode(palette, "GIF", transparency=2),
        "animated.gif": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        "small_frame.gif": gif_small_frame(image),
        "lzw.tiff": encode(image, "TIFF", compression="tiff_lzw"),
    }
    for name, content in cases.items():
        (OUT / name).write_bytes(content)
        decoded = Image.open(io.BytesIO(content)).convert("RGB")
        (OUT / name).with_name(name + ".rgb").write_bytes(decoded.tobytes())


def resize_cases():
    sizes = [(37, 53, 64, 64), (64, 64, 17, 23), (100, 75, 33, 33), (7, 5, 20, 31), (1, 1, 4, 3), (240, 320, 31, 48),
             (40, 40, 40, 27), (40, 40, 13, 40), (3, 200, 9, 11), (133, 40, 56, 56), (90, 31, 40, 13), (64, 32, 48, 24)]
    with open(OUT / "resize.bin", "wb") as file:
        for height, width, new_height, new_width in sizes:
            file.write(struct.pack("<4i", height, width, new_height, new_width))
            file.write(noise(height, width).resize((new_width, new_height), Image.BICUBIC).tobytes())


def expand2square(image, colour):
    """LLaVA's llava/mm_utils.py."""
    width, height = image.size
    if width == height:
        return image
    square = Image.new(image.mode, (max(width, height),) * 2, colour)
    square.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return square


def preprocess_cases():
    size = 24
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                                   do_rescale=False, do_normalize=False)
    with open(OUT / "preprocess.bin", "wb") as file:
        for height, width in [(24, 24), (30, 47), (61, 35), (13, 29), (24, 31), (100, 99)]:
            for pad in (0, 1):
                image = noise(height, width)
                if pad:
                    image = expand2square(image, tuple(int(x * 255) for x in MEAN))
                pixels = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
                assert pixels.shape == (3, size, size)
                file.write(struct.pack("<3i", height, width, pad) + pixels.astype(np.uint8).tobytes())


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    decode_cases()
    resize_cases()
    preprocess_cases()
