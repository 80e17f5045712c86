"""Pictures from files, as the processor of a vision-language model takes them."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from popcompile.errors import PopcompileError
from popcompile.files import read_regular
from popcompile.loading import one_line

#: of a file, at most, in bytes, and of a picture, in pixels along a side; what is decoded takes 3 bytes a pixel
_BYTES, _SIDE, _PIXELS = 64 << 20, 16_384, 64 << 20
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


#: how their files are called
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def picture_files(folder: Path, option: str) -> list[Path]:
    """The files in a folder that are called as pictures are, by name. option: whose value the folder is.

    Raises PopcompileError where there are none.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    except FileNotFoundError:
        raise PopcompileError(f"{option} {folder}: no such folder; give a folder with pictures") from None
    except NotADirectoryError:
        raise PopcompileError(f"{option} {folder}: is a file; give the folder that it is in") from None
    except OSError as error:
        raise PopcompileError(f"{option} {folder}: cannot be read ({error.strerror}); give another folder") from error
    if not files:
        raise PopcompileError(f"{option} {folder}: has no pictures; give a folder with {', '.join(_SUFFIXES)} files")
    return files


def read_picture(file: str) -> Image.Image:
    """A still picture in RGB, turned as its camera was held. Raises PopcompileError, of one line, where it is none."""
    if _URL.match(file):
        raise PopcompileError(f"{file}: an address, and popcompile reads files; download it and give the file")
    path = Path(file)
    try:
        content = read_regular(path, _BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise PopcompileError(f"{file}: cannot be read ({reason}); give a picture file of at most 64 MB") from error
    return decode_picture(content, file)


def decode_picture(content: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes, as `read_picture` returns it. name: for the line that says what is wrong with it.

    Raises PopcompileError, as `read_picture` does.
    """
    with _decoding(name):
        picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    _require_plain(name, picture)
    with _decoding(name):
        upright = ImageOps.exif_transpose(picture)
        return upright.convert("RGB")


@contextlib.contextmanager
def _decoding(file: str) -> Iterator[None]:
    """Whatever PIL raises about a file as one line."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file: anything
        raise PopcompileError(
            f"{file}: no picture that can be read ({one_line(error, 80)}); give a whole {', '.join(_FORMATS)} file"
        ) from error


def _require_plain(file: str, picture: Image.Image) -> None:
    """Raise PopcompileError for a size or a kind of picture that no vision tower is given."""
    width, height = picture.size
    if min(width, height) < 2:
        raise PopcompileError(f"{file}: has {width} x {height} pixels; give a picture of at least 2 x 2")
    if max(width, height) > _SIDE or width * height > _PIXELS:
        raise PopcompileError(
            f"{file}: has {width:,} x {height:,} pixels; make it smaller, of at most {_SIDE:,} a side and"
            f" {_PIXELS >> 20} million in all"
        )
    if getattr(picture, "n_frames", 1) > 1:
        raise PopcompileError(f"{file}: has {getattr(picture, 'n_frames', 0)} frames; give a still picture")
    if picture.mode in ("CMYK", "YCCK"):
        raise PopcompileError(f"{file}: is in {picture.mode}, the colours of print; convert it to RGB")
