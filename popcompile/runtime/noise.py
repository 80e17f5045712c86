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
    """ids of a prompt in which images stand behind the first tokens of `text` [S], one behind each as far as there are
    so many, and where they do.

    What has the id of an image's token in the text becomes another token.
    """
    taken = inputs.tokens.values()
    free = next(token for token in count() if token not in taken)
    words = text.masked_fill(torch.isin(text, torch.tensor(list(taken))), free)
    parts, places, at = [], [], 0
    for i, (rows, columns) in enumerate(sizes):
        word, seen = words[i : i + 1], torch.full((rows * columns,), inputs.tokens["image"])
        at += len(word)
        places.append(Place(at, rows, columns))
        parts += [word, seen]
        at += len(seen)
    return torch.cat([*parts, words[len(sizes) :]]), places
