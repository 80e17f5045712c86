"""The header of a GGUF file: every metadata key, and where every tensor lies. Nothing in it is taken on trust.

gguf.GGUFReader is not used: it spends 2 to 30 s on a vocabulary that we do not need, reports a file that is cut short
as a numpy reshape error, and believes every count. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popcompile.errors import PopcompileError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_KEYS, MAX_TENSORS, MAX_NAME, MAX_DIMENSIONS = 10_000, 200_000, 512, 4
MAX_STRINGS, MAX_STRING = 4_000_000, 16_384
"""Of an array, such as a vocabulary: transformers' merges take the square of a token's length (bytes)."""
SMALL = 1024
"""Arrays up to this length are kept: settings by layer. Longer ones belong to the tokenizer and are only counted."""
NAME = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Counted:
    """A long array of the metadata, walked but not kept. texts: of strings, else of numbers."""

    length: int
    texts: bool


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. shape: in PyTorch's order. kind: a GGMLQuantizationType. start: offset in the file, in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file says.

    Attributes:
        metadata: every key. Strings are decoded, arrays of more than `SMALL` elements are `Counted`.
        tensors: every tensor by llama.cpp's name.
        size: metadata and tensor table, in bytes.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    size: int


def read_header(model: str, path: Path) -> GgufHeader:
    """Walk the header of a GGUF file and check that every tensor lies within the file, in order and apart.

    Raises:
        PopcompileError: truncated, corrupt, a version other than 2 and 3, or one part of several.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _Walk(data).header()
        except (struct.error, LookupError, ValueError, TypeError, ArithmeticError) as error:
            raise PopcompileError(f"{model}: the GGUF header is truncated or corrupt; download it again") from error
        parts = header.metadata.get("split.count", 1)
        if parts != 1 and parts != 0:
            raise PopcompileError(f"{model}: one of {parts!r} parts; merge them first (llama-gguf-split --merge)")
        end = max((tensor.start + tensor.bytes for tensor in header.tensors.values()), default=header.size)
        if end > len(data):
            raise PopcompileError(
                f"{model}: truncated: its header needs {end:,} bytes, the file has {len(data):,}; download it again"
            )
        return header


class _Walk:
    """A reader at a position. Every count is bounded before anything is read that it counts."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def header(self) -> GgufHeader:
        version, tensors, keys = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}")
        _require(keys <= MAX_KEYS and tensors <= MAX_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            _require(key not in metadata)
            metadata[key] = self._value()
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        _require(type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0)
        size, position, found = self._at, 0, {}
        start = -(-size // alignment) * alignment
        for name, shape, kind, length, offset in table:
            _require(name not in found and offset == position)  # tensors follow each other, each from a boundary on
            found[name] = GgufTensor(shape, kind, start + offset, length)
            position = -(-(offset + length) // alignment) * alignment
        return GgufHeader(metadata, found, size)

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def _string(self) -> bytes:
        length = self._scalar("Q")
        _require(length <= len(self._data) - self._at)
        self._at += length
        return self._data[self._at - length : self._at]

    def _name(self) -> str:
        name = self._string()
        _require(len(name) <= MAX_NAME)
        text = name.decode("ascii")
        _require(NAME.fullmatch(text) is not None)
        return text

    def _value(self) -> Any:
        kind = self._scalar("I")
        if kind == STRING:
            return self._string().decode("utf-8")
        return self._array() if kind == ARRAY else self._scalar(SCALARS[kind])

    def _array(self) -> Any:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind != STRING:  # arrays of arrays are not in SCALARS: no file in use has them
            width = struct.calcsize(f"<{SCALARS[kind]}")
            _require(count * width <= len(self._data) - self._at)
            if count <= SMALL:
                return [self._scalar(SCALARS[kind]) for _ in range(count)]
            self._at += count * width
            return Counted(count, texts=False)
        _require(count <= MAX_STRINGS)
        kept = []
        for _ in range(count):
            text = self._string()
            _require(len(text) <= MAX_STRING)
            if count <= SMALL:
                kept.append(text.decode("utf-8"))
        return kept if count <= SMALL else Counted(count, texts=True)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self._name(), self._scalar("I")
        _require(1 <= dimensions <= MAX_DIMENSIONS)
        sizes = [self._scalar("Q") for _ in range(dimensions)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        _require(min(sizes) > 0 and sizes[0] % block == 0)
        return name, tuple(reversed(sizes)), kind, math.prod(sizes) // block * width, offset


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("out of bounds")
