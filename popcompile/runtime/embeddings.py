"""What a decoder that takes embeddings is given of token ids and images: embeddings and, for M-RoPE, positions.

Text has one position for each token, in all axes. An image begins at the position that the next token of text would
have; its tokens count rows and columns from there, and text goes on behind the larger of its sides. So positions fall
behind slots of the cache, and how far is kept with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popcompile.package.image_inputs import ImageInputs
from popcompile.runtime.batch import Batch, Place


@dataclass(frozen=True)
class RowImages:
    """The images among the new tokens of a row.

    features: [image tokens, W], in the tokens' order. places: in that order. tokens: how many there are of each kind.
    """

    features: Tensor
    places: list[Place]
    tokens: dict[str, int] = field(default_factory=dict)


class Embeddings:
    """Makes the decoder's inputs of ids."""

    def __init__(self, inputs: ImageInputs, embed: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        """embed: ids [B, S], image features [n, W] -> embeddings [B, S, W]. dtype: of features."""
        self._inputs, self._embed, self._dtype = inputs, embed, dtype
        taken = inputs.tokens.values()
        self._pad = next(token for token in count() if token not in taken)

    def batch(
        self,
        rows: Sequence[Tensor],
        lengths: Sequence[int],
        deltas: Sequence[int],
        images: Sequence[RowImages | None] | None = None,
    ) -> tuple[Batch, list[int]]:
        """rows: ids [tokens] of each. lengths: slots before them. deltas: the next position less the next slot.

        Returns the deltas behind them as well.
        """
        ids = pad_sequence(list(rows), batch_first=True, padding_value=self._pad)
        seen = images or [None] * len(rows)
        features = [row.features.to(self._dtype) for row in seen if row is not None]
        given = torch.cat(features) if features else torch.empty(0, self._inputs.width, dtype=self._dtype)
        values, after = {"inputs_embeds": self._embed(ids, given)}, list(deltas)
        places = [row.places if row is not None else [] for row in seen]
        if self._inputs.axes:
            positions = []
            for i, row in enumerate(rows):
                found, following = positions_of(len(row), lengths[i] + deltas[i], places[i], self._inputs.axes)
                positions.append(found)
                after[i] = following - lengths[i] - len(row)
            values["position_ids"] = pad_sequence(positions, batch_first=True)
        return Batch(values, [len(row) for row in rows], places), after


def positions_of(tokens: int, start: int, places: Sequence[Place], axes: int) -> tuple[Tensor, int]:
    """Positions [tokens, axes] of a row's tokens, and the one that follows. start: the first one's."""
    positions = torch.empty(tokens, axes, dtype=torch.int64)
    at, following = 0, start
    for place in places:
        positions[at : place.begin] = torch.arange(following, following + place.begin - at)[:, None]
        following += place.begin - at
        at = place.end
        inside = positions[place.begin : at].view(place.rows, place.columns, axes)
        inside[:] = following
        inside[..., -2] += torch.arange(place.rows)[:, None]
        inside[..., -1] += torch.arange(place.columns)
        following += max(place.rows, place.columns)
    positions[at:] = torch.arange(following, following + tokens - at)[:, None]
    return positions, following + tokens - at
