"""A vision-language package as a transformers model: it takes what the model's own processor makes of images and text.

Images may stand in any turn and any row. What the caller hands over are the pixels of the whole conversation, as for
transformers' own models; those whose tokens the cache holds are not encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.package.image_inputs import GRIDS, PIXELS, ImageInputs
from popcompile.runtime.batch import Place
from popcompile.runtime.embeddings import RowImages
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.generation_cache import PopCache
from popcompile.runtime.session import Runtime

#: arguments that have no row for each row of ids
_VISUALS = (*PIXELS.values(), *GRIDS.values())
_SEQUENCES = "num_return_sequences"
_T = TypeVar("_T")


class PopForImageTextToText(PopForCausalLM):
    """`PopForCausalLM` for prompts with images: `model.generate(**processor(...))`.

    pixel_values [patches, features] and image_grid_thw [images, 3], or pixel_values [images, 3, S, S] where images have
    one size, and the same of videos; of all rows, one after the other. Which tokens are images the model sees by their
    ids: mm_token_type_ids and token_type_ids, which processors give as well, say nothing new.
    num_return_sequences, which `generate` sets: so many rows, one after another, are one prompt, whose pixels are given
    once.
    Raises PopcompileError where pixels and image tokens do not go together.
    """

    input_modalities = ("image", "text")
    image_arguments = (*_VISUALS, "mm_token_type_ids", "token_type_ids", _SEQUENCES)

    def __init__(self, runtime: Runtime, prefill: str = "auto") -> None:
        super().__init__(runtime, prefill)
        images = self.manifest.images
        assert images is not None
        self._images = images

    def _images_of(self, rows: Sequence[Tensor], cache: PopCache, given: Mapping[str, Any]) -> list[RowImages] | None:
        if all(cache.kv.lengths) and all(len(row) == 1 for row in rows):
            return None  # generated tokens: what has the id of an image token there is text
        sequences = given.get(_SEQUENCES) or 1
        prompts = rows[::sequences]
        repeated = _repeated(prompts, sequences)
        if len(rows) != len(repeated) or not all(map(torch.equal, rows, repeated)):
            raise PopcompileError(
                f"{_SEQUENCES} is {sequences}, and rows of input_ids that follow one another are unlike; leave it out,"
                " and give the images of every row"
            )
        found = self._images_of_prompts(prompts, cache.images[::sequences], given)
        return None if found is None else _repeated(found, sequences)

    def _images_of_prompts(
        self, rows: Sequence[Tensor], held: Sequence[Mapping[str, int]], given: Mapping[str, Any]
    ) -> list[RowImages] | None:
        """held: image tokens of every row that the cache has, by kind."""
        visuals = {kind: Visuals.of(self._images, kind, given) for kind in PIXELS}
        tokens = [_count(row, self._images) for row in rows]
        if not any(any(counts.values()) for counts in tokens):
            if any(visuals.values()) and not any(any(counts.values()) for counts in held):
                raise PopcompileError(
                    "pixel_values without image tokens in input_ids; write prompts with the processor's chat template"
                )
            return None
        features: dict[str, list[list[Visual]]] = {}
        for kind in self._images.tokens:
            new = [counts[kind] for counts in tokens]
            if any(new):
                features[kind] = self._encode(kind, visuals[kind], [counts[kind] for counts in held], new)
        return [
            _row_images(row, self._images, {kind: found[i] for kind, found in features.items()}, counts)
            for i, (row, counts) in enumerate(zip(rows, tokens, strict=True))
        ]

    def _encode(
        self, kind: str, visuals: Visuals | None, held: Sequence[int], new: Sequence[int]
    ) -> list[list[Visual]]:
        """The images among the new tokens of every row. held, new: tokens of this kind in the cache, and new ones."""
        if visuals is None:
            raise PopcompileError(
                f"input_ids has {sum(new)} {kind} tokens and there is no {PIXELS[kind]}; give all that the processor"
                " returned"
            )
        rows = visuals.of_rows(held, new)
        chosen = [image for row in rows for image in row]
        features = self.runtime.encode_images(*visuals.take(chosen))
        parts = iter(features.split([visuals.tokens[image] for image in chosen]))
        return [[Visual(next(parts), visuals.frames[image]) for image in row] for row in rows]

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Repeat rows as transformers does, and no pixels: the tower encodes a prompt's once for all its rows."""
        visuals = {name: kwargs.pop(name) for name in _VISUALS if name in kwargs}
        ids, expanded = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return ids, expanded | visuals | ({_SEQUENCES: expand_size} if expand_size > 1 else {})


def encode_prompt_images(runtime: Runtime, ids: Tensor, given: Mapping[str, Any]) -> RowImages | None:
    """The images of one prompt ids [S]. given: what the processor made of them. Raises PopcompileError as the model."""
    images = PopForImageTextToText(runtime)._images_of([ids], PopCache(runtime.new_cache(1)), given)
    return None if images is None else images[0]


@dataclass(frozen=True)
class Visual:
    """features [tokens, W] of an image or video; frames: rows and columns in tokens of each of its frames."""

    features: Tensor
    frames: list[tuple[int, int]]


@dataclass(frozen=True)
class Visuals:
    """Images or videos as the processor gives them. tokens, patches, frames: of each, as `Visual` has them."""

    pixels: Tensor
    grids: Tensor | None
    tokens: list[int]
    patches: list[int]
    frames: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, inputs: ImageInputs, kind: str, given: Mapping[str, Any]) -> Visuals | None:
        """None where there are none. Raises PopcompileError for what the model does not take."""
        pixels, grids = given.get(PIXELS[kind]), given.get(GRIDS[kind])
        if pixels is None:
            return None
        if kind not in inputs.tokens:
            raise PopcompileError(f"{PIXELS[kind]}: this model takes no {kind}s; give images")
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            raise PopcompileError(
                f'{PIXELS[kind]} must be a tensor of pixels; call the processor with return_tensors="pt"'
            )
        if not inputs.merge:
            count, tokens = len(pixels), inputs.tokens_per_image
            return cls(pixels, None, [tokens] * count, [1] * count, [[(1, tokens)]] * count)
        if not isinstance(grids, Tensor) or grids.dim() != 2 or grids.shape[1] != 3:
            raise PopcompileError(f"{GRIDS[kind]} must be a tensor [{kind}s, 3]; give all that the processor returned")
        sizes = [(t, h, w) for t, h, w in grids.tolist()]
        patches = [t * h * w for t, h, w in sizes]
        frames = [[(h // inputs.merge, w // inputs.merge)] * t for t, h, w in sizes]
        return cls(pixels, grids, [n // inputs.merge**2 for n in patches], patches, frames)

    def of_rows(self, held: Sequence[int], new: Sequence[int]) -> list[list[int]]:
        """Which of them are among the new tokens of each row. held: tokens of theirs that the cache has, of each row.

        Raises PopcompileError where they are not as many as tokens are, or where a row begins or ends in one.
        """
        there = sum(self.tokens)
        if there not in (sum(new), sum(held) + sum(new)):
            more = f" and the cache {sum(held)}" if any(held) else ""
            raise PopcompileError(
                f"input_ids has {sum(new)} image tokens{more}, and the pixels are for {there}; give each image once,"
                " with all the tokens that the processor wrote for it"
            )
        before = held if there == sum(held) + sum(new) else [0] * len(new)
        order, rows = iter(range(len(self.tokens))), []
        for old, count in zip(before, new, strict=True):
            self._next(order, old)
            rows.append(self._next(order, count))
        return rows

    def _next(self, order: Iterator[int], count: int) -> list[int]:
        """The next images, which have so many tokens together."""
        found: list[int] = []
        while count > 0:
            found.append(next(order))
            count -= self.tokens[found[-1]]
        if count < 0:
            raise PopcompileError(
                "a part of an image's tokens is in one call or row and the rest in another; give an image whole"
            )
        return found

    def take(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Pixels and grids of some of them."""
        parts = self.pixels.split(self.patches) if sum(self.patches) == len(self.pixels) else ()
        if not parts:
            raise PopcompileError(
                f"pixel_values has {len(self.pixels)} patches and the grids {sum(self.patches)}; give both as one"
                " processor made them"
            )
        grids = None if self.grids is None else self.grids[list(chosen)]
        return torch.cat([parts[image] for image in chosen]), grids


def _repeated(items: Sequence[_T], times: int) -> list[_T]:
    """[a, b] -> [a, a, b, b]."""
    return [item for item in items for _ in range(times)]


def _count(row: Tensor, inputs: ImageInputs) -> dict[str, int]:
    return {kind: int((row == token).sum()) for kind, token in inputs.tokens.items()}


def _row_images(
    row: Tensor, inputs: ImageInputs, visuals: Mapping[str, Sequence[Visual]], tokens: dict[str, int]
) -> RowImages:
    """The images of a row's new tokens, in the order in which their tokens stand there.

    Raises PopcompileError where an image's tokens do not stand together.
    """
    frames = {
        kind: iter([(f, size) for v in found for f, size in zip(_split(v), v.frames, strict=True)])
        for kind, found in visuals.items()
    }
    features, places = [torch.empty(0, inputs.width)], []
    at = 0
    kinds = {token: kind for kind, token in inputs.tokens.items()}
    ids = row.tolist()
    while at < len(ids):
        kind = kinds.get(ids[at])
        if kind is None:
            at += 1
            continue
        found, (rows, columns) = next(frames[kind])
        if ids[at : at + rows * columns] != [ids[at]] * (rows * columns):
            raise PopcompileError("the tokens of an image do not stand together; use the processor's chat template")
        features.append(found.float())
        places.append(Place(at, rows, columns))
        at += rows * columns
    return RowImages(torch.cat(features), places, tokens)


def _split(visual: Visual) -> tuple[Tensor, ...]:
    """The features of each frame."""
    return visual.features.split([rows * columns for rows, columns in visual.frames])
