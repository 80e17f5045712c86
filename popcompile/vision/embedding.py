"""Embeddings of tokens, and images' features in the places of their tokens, as one module that is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popcompile.passes import ops


class Embedding(nn.Module):
    """input_ids [B, S] int64, image_features [n, W] -> inputs_embeds [B, S, W].

    Features take the places of image tokens in order, row by row. A row of text is zero behind the model's own H
    columns. With n = 0 image tokens are embedded as text is; another n than the number of image tokens is an error.
    """

    def __init__(self, model: Any, image_tokens: Sequence[int], width: int) -> None:
        """width: W. image_tokens: ids, which may be beyond the vocabulary."""
        super().__init__()
        self.embed = model.get_input_embeddings()
        self._tokens, self._width = tuple(image_tokens), width

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        first, *others = (input_ids == token for token in self._tokens)
        places = first
        for other in others:
            places = torch.logical_or(places, other)
        if max(self._tokens) >= self.embed.num_embeddings:
            input_ids = input_ids.masked_fill(places, 0)
        x = self.embed(input_ids)
        return ops.scatter_features(F.pad(x, (0, self._width - x.shape[-1])), places, image_features)
