"""What the whole model makes of calibration text: token rows and the hidden states before each layer, on disk.

Every choice of layers is fitted to the same hidden states, so they are computed once, a layer after the other over all
of the text, which reads a layer's weights once. They lie in files that are mapped and have no name, so memory does not
grow with the text and a killed process leaves nothing behind.
"""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.package.staging import require_disk_space
from popcompile.pruning.layerwise import LayerwiseModel, Tokens
from popcompile.pruning.rows import Rows

#: tokens that a layer runs at a time
_BATCH_TOKENS = 2560


class HiddenStates:
    """Rows of tokens and the hidden states [N, T, hidden] that the whole model has before layers `first`..L.

    folder: where files may be, by default that of temporary files.
    `before(L)` is the last layer's output. Raises PopcompileError where a layer computes NaN or infinity.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        rows: Rows,
        first: int,
        folder: Path | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> None:
        self.model, self.rows, self.first, self._files = model, rows, first, Files(folder)
        self._states = [self.scratch() for _ in range(first, model.num_layers + 1)]
        done, total = 0, len(list(self.batches())) * model.num_layers
        x = self.before(0) if first == 0 else self.scratch()
        for batch in self.batches():
            x[batch] = model.embed(self.tokens(batch))
        for layer in range(model.num_layers):
            out = self.before(layer + 1) if layer + 1 >= first else x
            for batch in self.batches():
                out[batch] = self.run_layer(layer, x[batch], self.tokens(batch))
                require_finite(out[batch], layer)
                done += 1
                if progress:
                    progress(done, total)
            x = out

    def before(self, layer: int) -> Tensor:
        """[N, T, hidden], backed by the file. layer: at least `first`."""
        assert layer >= self.first
        return self._states[layer - self.first]

    def thinned(self, step: int) -> HiddenStates:
        """Every `step`-th row, and the same hidden states."""
        thinned = copy.copy(self)
        thinned.rows = self.rows[::step]
        thinned._states = [states[::step] for states in self._states]
        return thinned

    def batches(self) -> Iterator[slice]:
        """Rows to run together. After each, what of the files is in memory is given back."""
        step = max(1, _BATCH_TOKENS // self.rows.length)
        for start in range(0, len(self.rows), step):
            yield slice(start, min(start + step, len(self.rows)))
            self.release()

    def release(self) -> None:
        """Give memory back that holds what the files hold."""
        self._files.release()

    def tokens(self, batch: slice) -> Tokens:
        rows = self.rows[batch]
        return self.model.tokens(rows, rows.slots)

    def run_layer(self, layer: int, x: Tensor, tokens: Tokens) -> Tensor:
        """A whole layer over rows, as the whole model runs it."""
        return self.model.layer(layer, x.to(self.model.device), tokens, tokens.among_themselves())

    def scratch(self) -> Tensor:
        """Room for hidden states of all rows."""
        return self.room((len(self.rows), self.rows.length, self.model.hidden_size))

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros in a file, fp32, that are gone when the tensor is."""
        return self._files.tensor(shape)


class Files:
    """Room for tensors in files of their own, which are gone when the tensors are."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: where the files are, by default that of temporary files."""
        self._folder = folder or Path(tempfile.gettempdir())
        self._maps: WeakSet[mmap.mmap] = WeakSet()

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros, fp32. Raises PopcompileError where the disk has no room for them."""
        size = 4 * int(np.prod(shape))
        require_disk_space(self._folder / "calibration", size)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a disk that gets full is told of now, and not when pages are written
                os.posix_fallocate(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
        self._maps.add(mapped)
        return torch.from_numpy(np.frombuffer(mapped, np.float32).reshape(shape))

    def release(self) -> None:
        """Let the pages of all tensors go; those that are read again come from the files."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """[N, Q, hidden] of x [N, T, hidden] at positions [N, Q]."""
    return x.gather(1, positions.to(x.device)[:, :, None].expand(-1, -1, x.shape[2]))


def require_finite(x: Tensor, layer: int) -> None:
    """Raise PopcompileError, naming the layer, where its output has NaN or infinity."""
    if not torch.isfinite(x).all():
        raise PopcompileError(
            f"layer {layer} computes NaN or infinity on the calibration text; the checkpoint is damaged or does not fit"
            " its config: fix it, or convert with --kv-projection layer"
        )
