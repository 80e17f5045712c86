"""Images of noise, of a stated size: what checks graphs, or times them, needs neither a picture nor a processor.

A size is a number of rows and columns in tokens. Where images have one size, it is one row of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from popcompile.package.image_inputs import PIXELS, ImageInputs
from popcompile.runtime.batch import Place
from popcompile.runtime.session import Runtime

Size = tuple[int, int]
#: tokens of text before the first image
_BEFORE = 1


def make_pixels(runtime: Runtime, sizes: Sequence[Size], seed: int) -> tuple[Tensor, Tensor | None]:
    """What a processor would give of images: pixels [patches, features] and grids [images, 3], or pixels
    [images, 3, S, S] where images have one size.
    """
    inputs = runtime.manifest.images
    assert inputs is not None
    values = {value.name: value.shape for value in runtime.open("vision").get_inputs()}
    return noise(inputs, values[PIXELS["image"]][1:], sizes, seed)


def noise(inputs: ImageInputs, shape: Sequence[int], sizes: Sequence[Size], seed: int) -> tuple[Tensor, Tensor | None]:
    """The same without a runtime. shape: of a patch's features, or of an image where all have one size."""
    generator = torch.Generator().manual_seed(seed)
    if not inputs.merge:
        return torch.randn(len(sizes), *shape, generator=generator), None
    grids = torch.tensor([[1, rows * inputs.merge, columns * inputs.merge] for rows, columns in sizes])
    return torch.randn(int(grids.prod(dim=1).sum()), *shape, generator=generator), grids


def make_prompt(inputs: ImageInputs, text: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Place]]:
    """ids of a prompt in which images stand behind the first token of `text` [S], one after another, and where they do.

    What has the id of an image's token in the text becomes another token.
    """
    taken = inputs.tokens.values()
    free = next(token for token in count() if token not in taken)
    words = text.masked_fill(torch.isin(text, torch.tensor(list(taken))), free)
    places, at = [], _BEFORE
    for rows, columns in sizes:
        places.append(Place(at, rows, columns))
        at += rows * columns
    seen = torch.full((at - _BEFORE,), inputs.tokens["image"])
    return torch.cat((words[:_BEFORE], seen, words[_BEFORE:])), places
