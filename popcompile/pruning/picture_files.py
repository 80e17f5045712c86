"""The user's pictures to calibrate on: a folder of them."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from popcompile.errors import PopcompileError
from popcompile.runtime.pictures import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
#: pictures that are read at most, and pixels along their longer side; prompts have room for smaller ones
_MOST, _SIDE = 128, 1024


def read_pictures(folder: Path, seed: int) -> list[Image.Image]:
    """The folder's pictures, or some of them where they are many, in the order of their names.

    Raises PopcompileError where there is no such folder, where there are none in it, and where one cannot be read.
    """
    option = f"--calibration-images {folder}"
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    except FileNotFoundError:
        raise PopcompileError(f"{option}: no such folder; give a folder with pictures") from None
    except NotADirectoryError:
        raise PopcompileError(f"{option}: is a file; give the folder that it is in") from None
    except OSError as error:
        raise PopcompileError(f"{option}: cannot be read ({error.strerror}); give another folder") from error
    if not files:
        raise PopcompileError(f"{option}: has no pictures; give a folder with {', '.join(SUFFIXES)} files")
    if len(files) > _MOST:
        files = sorted(random.Random(seed).sample(files, _MOST))
    return [_read(file) for file in files]


def _read(file: Path) -> Image.Image:
    picture = read_picture(str(file))
    picture.thumbnail((_SIDE, _SIDE))
    return picture
