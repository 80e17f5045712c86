"""Text sampled from the model itself, so that calibration and analysis need no data set.

Every row starts with a token of its own and goes on with what the model finds likely (temperature 1). In a model's own
text all of its training text is represented, which transfers better than one real domain (docs/calibration.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popcompile.execution import call_reference
from popcompile.passes import ops
from popcompile.passes.graph import find, shape_of


@torch.inference_mode()
def sample(
    model: fx.GraphModule,
    starts: Sequence[Tensor],
    length: int,
    *,
    seed: int,
    batch: int = 32,
    progress: Callable[[int, int], Any] | None = None,
) -> Tensor:
    """Rows of `length` tokens [len(starts), length] int64, row i beginning with the tokens of starts[i].

    model: the canonical graph with real weights (execution.materialise). progress(done, total) counts decode steps.
    """
    step = call_reference(model, {ops.append_kv: _write_in_place})
    random = torch.Generator().manual_seed(seed)
    total, done = -(-len(starts) // batch) * (length - 1), 0
    sampled = []
    for first in range(0, len(starts), batch):
        rows = starts[first : first + batch]
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        given = torch.tensor([len(row) for row in rows])
        for row, start in zip(ids, rows, strict=True):
            row[: len(start)] = start
        cache = [torch.zeros(len(rows), *shape, dtype=torch.float32) for shape in _cache_shapes(model, length)]
        for n in range(length - 1):
            mask = torch.ones(len(rows), n + 1, dtype=torch.int64)
            logits = step(ids[:, n : n + 1], mask, *(c[:, :, : n + 1] for c in cache))[0]
            likely = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=random)[:, 0]
            ids[:, n + 1] = torch.where(n + 1 < given, ids[:, n + 1], likely)
            done += 1
            if progress:
                progress(done, total)
        sampled.append(ids)
    return torch.cat(sampled)


def _write_in_place(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """append_kv for a cache whose last slot is still empty: all rows are equally long, one token at a time."""
    cache[:, :, -1:] = new
    return cache


def _cache_shapes(model: fx.GraphModule, slots: int) -> list[tuple[int, int, int]]:
    """[kv_heads, slots, head_size] of every key and value, in the order of the graph's inputs."""
    return [(int(shape_of(n)[1]), slots, int(shape_of(n)[3])) for n in find(model, op=ops.append_kv)]
