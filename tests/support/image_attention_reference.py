"""A tiny Gemma-3 that sees its images in both directions, its prompts, and a pruned prefill from transformers' modules.

Masks are transformers' own, of the whole prompt. A pruned layer makes cache entries of what the context tokens are
given, hands that on, and runs for the tokens of the window alone. Uses nothing of popcompile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import KVMaps, Map, cache_entries, own_projections
from torch import Tensor, nn
from transformers import DynamicCache, Gemma3Config, PreTrainedModel

#: tokens of an image, and how many a token of a sliding layer sees: fewer
IMAGE_TOKENS, SLIDING_WINDOW = 16, 12
LAYERS, HIDDEN = 4, 64
IMAGE, BEGIN, END = 90, 92, 93


def gemma3(layers: int = LAYERS, **changes: Any) -> Gemma3Config:
    """Two sliding layers, a full one, a sliding one, and so on; 4 heads over 2 of keys and values."""
    text = {
        "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16,
        "layer_types": (["sliding_attention", "sliding_attention", "full_attention"] * layers)[:layers],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    return Gemma3Config(
        text_config=text | changes, vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS, image_token_id=IMAGE,
        boi_token_id=BEGIN, eoi_token_id=END,
    )  # fmt: skip


@dataclass(frozen=True)
class Image:
    """marked: whether a token stands before its own ones, and one behind them."""

    marked: bool = True


#: what a prompt is made of: a number of words, or an image
Part = int | Image


@dataclass(frozen=True)
class Prompt:
    """One row: token ids [1, S], and pixels [images, 3, side, side]."""

    ids: Tensor
    pixels: Tensor | None

    @property
    def types(self) -> Tensor:
        """1 for a token of an image, [1, S]."""
        return (self.ids == IMAGE).long()


def make_prompt(parts: Sequence[Part], seed: int = 0) -> Prompt:
    """Random words and pixels. Where an image is last, the mark behind it is left out."""
    random = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            ids += torch.randint(3, 80, (part,), generator=random).tolist()
        else:
            last = i + 1 == len(parts)
            ids += [BEGIN] * part.marked + [IMAGE] * IMAGE_TOKENS + [END] * (part.marked and not last)
    images = sum(not isinstance(part, int) for part in parts)
    return Prompt(torch.tensor([ids]), torch.randn(images, 3, 32, 32, generator=random) if images else None)


@torch.no_grad()
def embeddings_of(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """What a compiled decoder is given, [1, S, hidden + 1]: the last column says which tokens are an image's."""
    embeddings, types = model.get_input_embeddings()(prompt.ids), prompt.types[..., None]
    if prompt.pixels is not None:
        features = model.model.get_image_features(prompt.pixels, return_dict=True).pooler_output
        embeddings = embeddings.masked_scatter(types.bool(), features)
    return torch.cat((embeddings, types.to(embeddings.dtype)), -1)


@torch.no_grad()
def full_logits(model: PreTrainedModel, prompt: Prompt, *, causal: bool = False) -> Tensor:
    """The whole model's logits of every token [1, S, vocabulary]; causal: with the mask of text."""
    types = None if causal else prompt.types
    return model(input_ids=prompt.ids, pixel_values=prompt.pixels, token_type_ids=types).logits


@torch.no_grad()
def forward(model: PreTrainedModel, wide: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of every token [1, S, vocabulary] of embeddings [1, S, hidden + 1] after a cache, which is of text."""
    types = torch.cat((torch.zeros(1, cache.get_seq_length()), wide[:, :, -1]), 1).long()
    return model(inputs_embeds=wide[:, :, :-1], token_type_ids=types, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def pop_prefill(
    model: PreTrainedModel,
    wide: Tensor,
    pruned: Collection[int],
    *,
    window: int = 1,
    cache: DynamicCache | None = None,
    projections: Mapping[int, KVMaps] | None = None,
    bypasses: Mapping[int, Map] | None = None,
) -> tuple[Tensor, DynamicCache]:
    """Logits of the boundary token [1, 1, vocabulary] and the cache after a prompt [1, S, hidden + 1].

    projections: of pruned layers that have calibrated ones. bypasses: by the last layer of a run. window: how many
    tokens at the end of the prompt take the whole model.
    """
    cache = DynamicCache() if cache is None else cache
    decoder, context = model.model.language_model, max(0, wide.shape[1] - window)
    with _skipping(decoder, pruned, context, projections or {}, bypasses or {}):
        return forward(model, wide, cache)[:, -1:], cache


@contextlib.contextmanager
def _skipping(
    decoder: nn.Module,
    pruned: Collection[int],
    context: int,
    projections: Mapping[int, KVMaps],
    bypasses: Mapping[int, Map],
) -> Iterator[None]:
    layers = list(decoder.layers)
    for i in pruned:
        decoder.layers[i] = _Skipped(layers[i], i, context, projections.get(i), bypasses.get(i))
    try:
        yield
    finally:
        for i in pruned:
            decoder.layers[i] = layers[i]


class _Skipped(nn.Module):
    """A layer for what is behind the first `context` tokens; for these it makes cache entries."""

    def __init__(self, layer: nn.Module, index: int, context: int, maps: KVMaps | None, bypass: Map | None) -> None:
        super().__init__()
        self.layer, self.index, self.context, self.maps, self.bypass = layer, index, context, maps, bypass

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        x, tail = hidden_states.split([self.context, hidden_states.shape[1] - self.context], 1)
        cache, mask, positions = (
            named.get("cache", named.get("past_key_values")),
            *map(named.pop, ("attention_mask", "position_ids")),
        )
        rope = [t.split([self.context, tail.shape[1]], 1) for t in named.pop("position_embeddings")]
        if self.context:
            slots = positions[:, : self.context]
            own = self.maps is None
            key, value = own_projections(self.layer, x) if own else (m.apply(x, slots) for m in self.maps)
            cache.update(*cache_entries(self.layer, key, value, [t[0] for t in rope]), self.index)
            x = x if self.bypass is None else x + self.bypass.apply(x, slots)
        done = self.layer(
            tail, attention_mask=mask[:, :, self.context :], position_ids=positions[:, self.context :],
            position_embeddings=tuple(t[1] for t in rope), **named,
        )  # fmt: skip
        return torch.cat((x, done), 1)
