"""Pictures of numbers, drawn with PIL's own font."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: pixels along each side of what becomes one image token
CELL = 16
#: heights of digits, in pixels of the font
_SIZES = range(18, 27)
#: pixels between two digits, and between a digit and the picture's edge
_GAP = 2


#: left, top, right and bottom, in pixels
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """A number as light digits on a dark ground, each at a height of its own.

    number: its digits from left to right. boxes: of each digit. Width and height are multiples of CELL.
    """

    number: str
    image: Image.Image
    boxes: tuple[Box, ...]


def cells(picture: Picture) -> int:
    """How many image tokens a picture becomes."""
    return (picture.image.width // CELL) * (picture.image.height // CELL)


def digits_in_cells(picture: Picture, share: float = 0.2) -> list[int]:
    """The digit that covers most of each cell, row by row; 10 where none covers `share` of it."""
    found = []
    for top in range(0, picture.image.height, CELL):
        for left in range(0, picture.image.width, CELL):
            covered = [_common(box, (left, top, left + CELL, top + CELL)) for box in picture.boxes]
            most = max(range(len(covered)), key=covered.__getitem__)
            found.append(int(picture.number[most]) if covered[most] > share * CELL**2 else 10)
    return found


def _common(one: Box, other: Box) -> int:
    """Pixels that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def draw_number(number: str, width: int, height: int, random: Random) -> Picture:
    """A picture of `width` x `height` pixels. Digits get smaller where they would not fit."""
    size = random.choice(_SIZES)
    glyphs = [_glyph(digit, size) for digit in number]
    while sum(g.width for g in glyphs) + _GAP * (len(number) + 1) > width or max(g.height for g in glyphs) > height:
        size -= 1
        glyphs = [_glyph(digit, size) for digit in number]
    spare = width - sum(g.width for g in glyphs) - _GAP * (len(number) + 1)
    shifts = sorted(random.randint(0, spare) for _ in glyphs)
    image, boxes, taken = Image.new("L", (width, height)), [], _GAP
    for glyph, shift in zip(glyphs, shifts, strict=True):
        left, top = taken + shift, random.randint(0, height - glyph.height)
        image.paste(glyph, (left, top))
        boxes.append((left, top, left + glyph.width, top + glyph.height))
        taken += glyph.width + _GAP
    return Picture(number, _with_noise(image, random), tuple(boxes))


@cache
def _glyph(digit: str, size: int) -> Image.Image:
    """A digit, cut to what is drawn of it."""
    canvas = Image.new("L", (2 * size, 2 * size))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(canvas).text((size // 2, size // 4), digit, fill=255, font=font, stroke_width=1)
    return canvas.crop(canvas.getbbox())


def _with_noise(image: Image.Image, random: Random) -> Image.Image:
    """Less bright, and no two pixels alike."""
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, 5, (image.height, image.width))
    pixels = np.asarray(image) * random.uniform(0.6, 1.0) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
