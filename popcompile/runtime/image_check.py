"""Check the graphs around a package's decoder on images of noise, in numbers.

It needs no second model: an image has as many features as the manifest says, all of them finite, and the same ones
alone as beside another image of its size; unlike images have unlike features, and a prompt tells them apart. Where text
is embedded by a graph of its own too, both make the same of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.export.precisions import PRECISIONS
from popcompile.package.image_inputs import ImageInputs
from popcompile.runtime.embeddings import RowImages
from popcompile.runtime.noise import Size, make_pixels, make_prompt
from popcompile.runtime.session import Runtime

#: rows and columns in tokens, where images have any size: unlike ones, for a graph may have been made for a single one
SIZES: tuple[Size, ...] = ((2, 3), (5, 2))
#: of the vocabulary, at most, whose embeddings are compared
_TOKENS = 64


def check_images(runtime: Runtime) -> str:
    """What was found, in words. Raises PopcompileError where a check fails."""
    inputs, limit = runtime.manifest.images, runtime.manifest.context_length
    assert inputs is not None
    sizes = image_sizes(inputs)
    counts = [rows * columns for rows, columns in sizes]
    if max(counts) > limit - 2:
        raise PopcompileError(
            f"{runtime.folder}: images have {max(counts)} tokens, and the context has {limit}; convert again"
        )
    worst = max(_difference(runtime, inputs, size) for size in sizes)
    if worst > (allowed := PRECISIONS[runtime.manifest.dtype].tolerance):
        raise PopcompileError(
            f"{runtime.folder}: features of an image differ by {worst:.1e} of the largest value where another is beside"
            f" it (allowed: {allowed:.0e}) on {runtime.provider.device}; convert again, or report it"
        )
    _require_seen(runtime, inputs, sizes[0])
    if "text_embedding" in runtime.manifest.graphs:
        _require_same_text(runtime, inputs)
    return (
        f"an image of {' or '.join(map(str, counts))} tokens has the same features alone and beside another; largest"
        f" relative difference {worst:.1e}"
    )


def image_sizes(inputs: ImageInputs) -> tuple[Size, ...]:
    """Of the images that are tried."""
    return SIZES if inputs.merge else ((1, inputs.tokens_per_image),)


def _difference(runtime: Runtime, inputs: ImageInputs, size: Size) -> float:
    """Largest relative difference between the features of an image alone and beside another one of its size."""
    pixels, grids = make_pixels(runtime, [size, size], seed=0)
    tokens = size[0] * size[1]
    both = _features(runtime, inputs, pixels, grids, 2 * tokens)
    alone = _features(runtime, inputs, pixels[: len(pixels) // 2], None if grids is None else grids[:1], tokens)
    first, second = both.split(tokens)
    if torch.equal(first, second):
        raise PopcompileError(f"{_vision(runtime)}: gives unlike images the same features; convert again")
    return float((first - alone).abs().max() / alone.abs().max().clamp(min=1e-6))


def _features(runtime: Runtime, inputs: ImageInputs, pixels: Tensor, grids: Tensor | None, tokens: int) -> Tensor:
    """Features of images, [tokens, W], in fp32."""
    features = runtime.encode_images(pixels, grids).float()
    if features.shape != (tokens, inputs.width):
        raise PopcompileError(
            f"{_vision(runtime)}: gives features {list(features.shape)} of images that have {tokens} tokens and"
            f" {inputs.width} columns; convert again"
        )
    if not torch.isfinite(features).all():
        raise PopcompileError(
            f"{_vision(runtime)}: computes NaN or infinity on {runtime.provider.device}; try --dtype fp32"
        )
    return features


def _require_seen(runtime: Runtime, inputs: ImageInputs, size: Size) -> None:
    """Raise PopcompileError where the cache after a prompt is the same whichever image is in it."""
    ids, places = make_prompt(inputs, torch.zeros(2, dtype=torch.int64), [size])
    caches = []
    for seed in (0, 1):
        images = RowImages(runtime.encode_images(*make_pixels(runtime, [size], seed)), places)
        cache = runtime.new_cache(1)
        runtime.feed([ids], cache, "prefill", images=[images])
        caches.append(cache.tensors())
    if all(torch.equal(one, other) for one, other in zip(*caches, strict=True)):
        raise PopcompileError(
            f"{runtime.folder}: {runtime.manifest.graphs['embedding']} leaves images out of prompts; convert again"
        )


def _require_same_text(runtime: Runtime, inputs: ImageInputs) -> None:
    """Raise PopcompileError where the two graphs that embed text do it in two ways."""
    last = runtime.manifest.vocab_size - 1
    ids = torch.cat((torch.linspace(0, last, _TOKENS).long(), torch.tensor(list(inputs.tokens.values()))))[None]
    no_features = torch.empty(0, inputs.width, dtype=runtime.cache_dtype)
    if not torch.equal(runtime.embed(ids, None), runtime.embed(ids, no_features)):
        apart, together = (runtime.manifest.graphs[stage] for stage in ("text_embedding", "embedding"))
        raise PopcompileError(f"{runtime.folder}: {apart} embeds text otherwise than {together}; convert again")


def _vision(runtime: Runtime) -> str:
    """The graph, for a complaint."""
    return f"{runtime.folder}: {runtime.manifest.graphs['vision']}"
