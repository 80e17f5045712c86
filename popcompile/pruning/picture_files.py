"""The user's pictures to calibrate on: a folder of them."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from popcompile.runtime.pictures import picture_files, read_picture

#: pictures that are read at most, and pixels along their longer side; prompts have room for smaller ones
_MOST, _SIDE = 128, 1024


def read_pictures(folder: Path, seed: int) -> list[Image.Image]:
    """The folder's pictures, or some of them where they are many, in the order of their names.

    Raises PopcompileError where there is no such folder, where there are none in it, and where one cannot be read.
    """
    files = picture_files(folder, "--calibration-images")
    if len(files) > _MOST:
        files = sorted(random.Random(seed).sample(files, _MOST))
    return [_read(file) for file in files]


def _read(file: Path) -> Image.Image:
    picture = read_picture(str(file))
    picture.thumbnail((_SIDE, _SIDE))
    return picture
