"""Rows of tokens that a model is run on, and what its decoder is given of them.

    text                input_ids
    text and images     inputs_embeds, of the program's "embedding" graph, and position_ids where RoPE reads several

What is stored, drawn and compared are ids, whatever the decoder takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from popcompile.passes import Program, ops
from popcompile.passes.graph import inputs_of, position_ids_of, shape_of
from popcompile.pruning.execution import Reader, call_reference, device_of, materialise
from popcompile.text.lists import RetrievalText


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of rows. features: [n, W], of all of them. index: [N, T] int64, a token's row in features, -1 of
    text. position_ids: [axes, N, T], of all tokens, with axes 0 for a decoder without.
    """

    features: Tensor
    index: Tensor
    position_ids: Tensor

    def joined(self, other: ImageTokens) -> ImageTokens:
        """Of the rows of both."""
        moved = torch.where(other.index < 0, -1, other.index + len(self.features))
        features = [images.features for images in (self, other) if len(images.features)]
        return ImageTokens(
            torch.cat(features), torch.cat((self.index, moved)), torch.cat((self.position_ids, other.position_ids), 1)
        )


@dataclass(frozen=True)
class Rows:
    """Rows of tokens of one length, on the CPU. ids: [N, T] int64. images: None for text alone."""

    ids: Tensor
    images: ImageTokens | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice | Tensor) -> Rows:
        """Some of the rows."""
        if (images := self.images) is not None:
            images = replace(images, index=images.index[chosen], position_ids=images.position_ids[:, chosen])
        return Rows(self.ids[chosen], images)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.ids.shape[1]

    @property
    def slots(self) -> Tensor:
        """Of all tokens of every row, [N, T]."""
        return torch.arange(self.length).expand(len(self), -1)

    @property
    def image_ends(self) -> Tensor | None:
        """The last slot of each token's image, and of text its own, [N, T]. None of text alone."""
        if self.images is None:
            return None
        of_image, slots = self.images.index >= 0, self.slots
        behind = torch.where(of_image, self.length, slots).flip(1).cummin(1).values.flip(1)  # the next token of text
        return torch.where(of_image, behind - 1, slots)

    def joined(self, other: Rows) -> Rows:
        """These rows, and others of the same length behind them."""
        ids = torch.cat((self.ids, other.ids))
        if self.images is None and other.images is None:
            return Rows(ids)
        axes = next(len(rows.images.position_ids) for rows in (self, other) if rows.images is not None)
        return Rows(ids, self._with_images(axes).joined(other._with_images(axes)))

    def _with_images(self, axes: int) -> ImageTokens:
        if self.images is not None:
            return self.images
        return ImageTokens(torch.empty(0), torch.full_like(self.ids, -1), self.slots.expand(axes, -1, -1))

    def draw_slots(self, begin: int, end: int, most: int, random: torch.Generator) -> Tensor:
        """Different slots from `begin` to `end` in each row, as many as all rows have and at most `most`, [N, Q].

        Of images' tokens none, and none that an image follows: nobody asks for a prediction there.
        """
        candidates = [torch.arange(begin, end)] * len(self)
        if (images := self.images) is not None:
            of_text = images.index < 0
            before_text = of_text & torch.cat((of_text[:, 1:], torch.ones_like(of_text[:, :1])), 1)
            candidates = [begin + row[begin:end].nonzero()[:, 0] for row in before_text]
        count = min(most, *map(len, candidates))
        return torch.stack([slots[torch.randperm(len(slots), generator=random)[:count]] for slots in candidates])


@dataclass(frozen=True)
class AskedRows:
    """Rows whose answers stand in them. answers: whether a token is a part of one, [N, T]."""

    rows: Rows
    answers: Tensor

    @classmethod
    def of(cls, text: RetrievalText) -> AskedRows:
        return cls(Rows(text.rows), text.answers)

    def joined(self, other: AskedRows) -> AskedRows:
        return AskedRows(self.rows.joined(other.rows), torch.cat((self.answers, other.answers)))

    def split(self, count: int) -> tuple[AskedRows, AskedRows]:
        """The first `count` rows, and the others."""
        first, others = slice(count), slice(count, None)
        return AskedRows(self.rows[first], self.answers[first]), AskedRows(self.rows[others], self.answers[others])


class DecoderInputs(ABC):
    """What a decoder is given of tokens beside mask and cache."""

    @abstractmethod
    def of(self, rows: Rows, slots: Tensor) -> tuple[Tensor, ...]:
        """Of the tokens at slots [N, Q] of each row, in the order of the graph's inputs: ids or embeddings first. The
        caller moves them to where the decoder is.
        """


class TokenIds(DecoderInputs):
    """input_ids [N, Q]."""

    def of(self, rows: Rows, slots: Tensor) -> tuple[Tensor, ...]:
        return (rows.ids.gather(1, slots),)


class TokenEmbeddings(DecoderInputs):
    """inputs_embeds [N, Q, W], and position_ids [axes, N, Q] where RoPE reads these."""

    def __init__(self, embedding: fx.GraphModule, axes: int) -> None:
        """embedding: the graph with real weights. axes: 0 for a decoder without position_ids."""
        self._embed, self._axes, self._device = call_reference(embedding), axes, device_of(embedding)
        width = int(shape_of(inputs_of(embedding)["image_features"])[1])
        self._no_features = torch.empty(0, width, device=self._device)

    def of(self, rows: Rows, slots: Tensor) -> tuple[Tensor, ...]:
        (embeddings,) = self._embed(rows.ids.gather(1, slots).to(self._device), self._no_features)
        position_ids = slots.expand(self._axes, -1, -1)
        if (images := rows.images) is not None:
            index = images.index.gather(1, slots)
            places = index >= 0
            features = images.features[index[places]].to(self._device)
            embeddings = ops.REFERENCE[ops.scatter_features](embeddings, places.to(self._device), features)
            position_ids = images.position_ids.gather(2, position_ids)
        return (embeddings, position_ids) if self._axes else (embeddings,)


#: of a decoder that takes ids
TOKEN_IDS = TokenIds()


def decoder_inputs(program: Program, read: Reader) -> DecoderInputs:
    """What the decoder of a canonical program takes, in fp32. Raises PopcompileError as `read` does."""
    if "embedding" not in program.graphs:
        return TOKEN_IDS
    position_ids = position_ids_of(program.graphs["model"])
    axes = 0 if position_ids is None else int(shape_of(position_ids)[0])
    return TokenEmbeddings(materialise(program.graphs["embedding"], program, read), axes)
