"""A package's weights, mapped once for all sessions of its graphs."""

from __future__ import annotations

import mmap
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import uses_external_data

from popcompile.errors import PopcompileError
from popcompile.runtime.cache import on_device
from popcompile.upstream import memory_map


class SharedWeights:
    """The package's data file, mapped once, as initializers for any number of sessions.

    On the CPU the values are views of the mapping: pages of the file, shared by every session and process and given
    back by the system when memory is short. On another device each tensor is copied there once.
    """

    def __init__(self, file: Path | BinaryIO, device: str) -> None:
        """file: where it is, or the open one, which stays the same whatever takes its place in the folder."""
        self._file = np.memmap(file, dtype=np.uint8, mode="r")
        self._device = device
        self._values: dict[tuple[int, int, tuple[int, ...]], ort.OrtValue] = {}
        self._copies: list[np.ndarray] = []

    def add_to(
        self, options: ort.SessionOptions, graph: onnx.GraphProto, flipped: Collection[str] = frozenset()
    ) -> None:
        """Give a session the external initializers of its graph. The values must outlive the session.

        flipped: those whose bytes have their highest bit flipped, in memory (integers.py).
        """
        for tensor in graph.initializer:
            if uses_external_data(tensor):
                options.add_initializer(tensor.name, self._value(tensor, tensor.name in flipped))

    def _value(self, tensor: onnx.TensorProto, flipped: bool = False) -> ort.OrtValue:
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, shape = int(place.get("offset", 0)), tuple(tensor.dims)
        key = (start, tensor.data_type, shape)  # a type of its own where it is flipped
        if key not in self._values:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if end > self._file.size:
                raise PopcompileError(f"{tensor.name} lies outside the weights file; convert the model again")
            stored = self._file[start:end]
            if flipped:
                stored = stored ^ np.uint8(0x80)
                self._copies.append(stored)  # what the value shows, and does not hold
            array = stored.view(dtype).reshape(shape)
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)  # numpy has no bf16
            if self._device != value.device_name():
                # an initializer may not own its memory: what comes by DLPack does not, and keeps its source
                value = ort.OrtValue.from_dlpack(on_device(value, self._device))
            self._values[key] = value
        return self._values[key]

    def close(self) -> None:
        """Let go of the file, and of what was copied to a GPU; no session may need them any more."""
        self._values.clear()
        self._copies.clear()
        del self._file

    def release_pages(self) -> None:
        """Let go of the pages read so far; they are mapped again when something reads them."""
        mapping = memory_map(self._file)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)
