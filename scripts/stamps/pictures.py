"""Pictures of the stamps data: rendering to squares on white, variants, colours, twins."""
import io
import pathlib
import random

import numpy as np
import resvg_py
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # Debian's own files, up to 231 million pixels; nothing from outside is read
SIDE_PX = 224  # what the tower takes: the trainer then resizes nothing
MARGIN = 0.04  # white left around the content, of the longer side

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
COLOURLESS = "black and white"


def load_content(stem: pathlib.Path, is_white_content: bool) -> Image.Image | None:
    """The picture STEM.png, else STEM.svg, as RGBA cut to what is not transparent, nor white unless `is_white_content`.
    None where neither file exists or nothing is visible."""
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    if png.exists():
        image = Image.open(png).convert("RGBA")
    elif svg.exists():
        image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(svg), width=2 * SIDE_PX, dpi=96))).convert("RGBA")
    else:
        return None
    image.thumbnail((4 * SIDE_PX, 4 * SIDE_PX), Image.Resampling.BOX)
    pixels = np.asarray(image)
    is_content = (pixels[..., 3] > 16) & (is_white_content | (pixels[..., :3].min(-1) < 244))
    rows, columns = np.flatnonzero(is_content.any(1)), np.flatnonzero(is_content.any(0))
    if rows.size < 8 or columns.size < 8:
        return None
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def on_square(content: Image.Image, scale: float = 1.0, shift_x: float = 0.5, shift_y: float = 0.5) -> Image.Image:
    """RGB of SIDE_PX, white. The content's longer side takes `scale` of what the margin leaves; `shift`s in [0, 1] place it."""
    longer = max(1, round(SIDE_PX * (1 - 2 * MARGIN) * scale))
    ratio = longer / max(content.size)
    size = tuple(max(1, round(edge * ratio)) for edge in content.size)
    # Premultiplied alpha, so that the colour of transparent pixels does not bleed into the edge.
    small = content.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    free_x, free_y = SIDE_PX - size[0], SIDE_PX - size[1]
    square = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    square.paste(small, (round(free_x * shift_x), round(free_y * shift_y)), small)
    return square


def variant(content: Image.Image, may_mirror: bool, rng: random.Random) -> Image.Image:
    """Another view for training: smaller, elsewhere, mirrored where left and right carry no meaning."""
    if may_mirror:
        content = content.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return on_square(content, rng.uniform(0.72, 1.0), rng.random(), rng.random())


def colour_of(square: Image.Image) -> str | None:
    """The main colour by counting pixels: one of COLOURS where one hue has at least 60 % of the coloured pixels, COLOURLESS
    where there are next to none, None where neither is clear."""
    hue, saturation, value = (np.asarray(square.convert("HSV"), dtype=np.float32)[..., i] / 255 for i in range(3))
    degrees = hue * 360
    is_content = (value < 0.95) | (saturation > 0.06)
    is_coloured = (saturation > 0.22) & (value > 0.25)
    num_content, num_coloured = int(is_content.sum()), int(is_coloured.sum())
    if int((is_content & (saturation > 0.09) & (value > 0.25)).sum()) < 0.02 * num_content:
        return COLOURLESS
    if num_coloured < 0.25 * num_content:
        return None
    warm = (degrees < 48) | (degrees >= 345)
    is_brown = warm & (degrees >= 8) & (degrees < 48) & ((value < 0.68) | (saturation < 0.45))
    is_pink = ((degrees >= 290) & (degrees < 345)) | (((degrees < 12) | (degrees >= 345)) & (saturation < 0.5) & (value > 0.75))
    is_pink &= ~is_brown
    plain = ~is_brown & ~is_pink
    masks = {
        "red": plain & ((degrees < 14) | (degrees >= 345)),
        "orange": plain & (degrees >= 14) & (degrees < 42),
        "yellow": plain & (degrees >= 42) & (degrees < 68),
        "green": plain & (degrees >= 68) & (degrees < 165),
        "blue": plain & (degrees >= 165) & (degrees < 258),
        "purple": plain & (degrees >= 258) & (degrees < 290),
        "pink": is_pink,
        "brown": is_brown,
    }
    counts = {name: int((mask & is_coloured).sum()) for name, mask in masks.items()}
    best = max(counts, key=counts.get)
    return best if counts[best] >= 0.6 * num_coloured else None


def fingerprint(square: Image.Image) -> np.ndarray:
    """[2, 432] float32: a 12 x 12 RGB thumbnail and its mirror image, to find twins by."""
    small = np.asarray(square.resize((12, 12), Image.Resampling.BOX), dtype=np.float32)
    return np.stack([small.reshape(-1), small[:, ::-1].reshape(-1)])


def is_twin(print: np.ndarray, others: np.ndarray, max_difference: float = 0.08) -> bool:
    """Whether one of `others` [N, 432] looks the same as `print`, mirrored or not: their mean difference is below
    `max_difference` of how far the picture is from white (so that two faint ones are not twins for being faint)."""
    if len(others) == 0:
        return False
    ink = (255 - print[0]).mean()
    return bool(min(np.abs(others - side).mean(1).min() for side in print) < max_difference * ink)
