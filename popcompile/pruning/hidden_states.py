"""What the whole model makes of calibration text: token rows and the hidden states before each layer, on disk.

Every choice of layers is fitted to the same hidden states, so they are computed once. They lie in a file that is mapped
and has no name, so memory does not grow with the text and a killed process leaves nothing behind.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
        self.model, self.rows, self.first, self._folder = model, rows, first, folder
        self._states = [self.scratch() for _ in range(first, model.num_layers + 1)]
        batches = list(self.batches())
        for done, batch in enumerate(batches):
            tokens = self.tokens(batch)
            x = model.embed(tokens)
            for layer in range(model.num_layers):
                if layer >= first:
                    self.before(layer)[batch] = x
                x = self.run_layer(layer, x, tokens)
                require_finite(x, layer)
            self.before(model.num_layers)[batch] = x
            if progress:
                progress(done + 1, len(batches))

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
        """Rows to run together."""
        step = max(1, _BATCH_TOKENS // self.rows.length)
        for start in range(0, len(self.rows), step):
            yield slice(start, min(start + step, len(self.rows)))

    def tokens(self, batch: slice) -> Tokens:
        rows = self.rows[batch]
        return self.model.tokens(rows, rows.slots)

    def run_layer(self, layer: int, x: Tensor, tokens: Tokens) -> Tensor:
        """A whole layer over rows, as the whole model runs it."""
        return self.model.layer(layer, x, tokens, tokens.among_themselves())

    def scratch(self) -> Tensor:
        """Room for hidden states of all rows."""
        return scratch((len(self.rows), self.rows.length, self.model.hidden_size), self._folder)


def scratch(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """Room for a tensor, fp32, in a file of its own in `folder`, or where temporary files are."""
    place = folder or Path(tempfile.gettempdir())
    require_disk_space(place / "calibration", 4 * int(np.prod(shape)))
    with tempfile.TemporaryFile(dir=place) as file:
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """[N, Q, hidden] of x [N, T, hidden] at positions [N, Q]."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


def require_finite(x: Tensor, layer: int) -> None:
    """Raise PopcompileError, naming the layer, where its output has NaN or infinity."""
    if not torch.isfinite(x).all():
        raise PopcompileError(
            f"layer {layer} computes NaN or infinity on the calibration text; the checkpoint is damaged or does not fit"
            " its config: fix it, or convert with --kv-projection layer"
        )
