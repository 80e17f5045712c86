"""Tiny vision-language models, their prompts, and a pruned prefill written from transformers' modules alone.

What the language model is given is made as transformers makes it: the model's own vision tower, positions and
DeepStack features, which its decoder adds by a mask of image tokens. Uses nothing of popcompile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from random_weights import randomize
from reference import KVMaps, Map, cache_entries, own_projections
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

LAYERS, HIDDEN, PATCH = 6, 64, 8
IMAGE, VIDEO, BEGIN, END = 90, 91, 92, 93
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
_TEXT = {
    "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {"depth": 2, "intermediate_size": 48, "num_heads": 4, "patch_size": PATCH, "out_hidden_size": HIDDEN}


def qwen3_vl(deepstack: Sequence[int] = (0, 1), **changes: Any) -> Qwen3VLConfig:
    """Interleaved sections of M-RoPE; features after the first layers, as many as `deepstack` names vision layers.

    changes: of the text config. That the head is tied stands in both configs, as in those of checkpoints.
    """
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = _VISION | {
        "hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": list(deepstack),
    }  # fmt: skip
    text = _TEXT | {"head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False} | changes
    tied = text["tie_word_embeddings"]
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_TOKENS)


def qwen2_5_vl(**changes: Any) -> Qwen2_5_VLConfig:
    """Chunked sections of M-RoPE, biases, no DeepStack."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = _VISION | {"hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32}
    return Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": rope} | changes, vision_config=vision, **_TOKENS)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """transformers' module with random weights, large enough that a wrong layer or a lost feature shows."""
    torch.manual_seed(seed)
    return randomize(AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval(), 0.2)


@dataclass
class Visual:
    """An image, or a video of several frames: patches of each frame, down and across."""

    height: int
    width: int
    frames: int = 1
    video: bool = False

    @property
    def tokens(self) -> list[int]:
        """Of all frames, each between marks of its own; 4 patches are a token."""
        return [BEGIN, *[VIDEO if self.video else IMAGE] * (self.height * self.width // 4), END] * self.frames


#: what a prompt is made of: a number of words, or an image
Part = int | Visual


@dataclass
class Prompt:
    """One row: token ids [1, S] and what a processor gives beside them."""

    ids: Tensor
    pixels: dict[str, Tensor]

    @property
    def kinds(self) -> Tensor:
        """0 for text, 1 for an image, 2 for a video, [1, S]."""
        return (self.ids == IMAGE).int() + 2 * (self.ids == VIDEO).int()


def make_prompt(parts: Sequence[Part], seed: int = 0) -> Prompt:
    """Random words and pixels. An image has marks around it; where it is last, the mark behind it is left out."""
    random = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    found: dict[str, list[Tensor]] = {}
    for i, part in enumerate(parts):
        if isinstance(part, int):
            ids += torch.randint(3, 80, (part,), generator=random).tolist()
            continue
        ids += part.tokens[: -1 if i + 1 == len(parts) else None]
        pixels, grid = ("pixel_values_videos", "video_grid_thw") if part.video else ("pixel_values", "image_grid_thw")
        patches = part.frames * part.height * part.width
        found.setdefault(pixels, []).append(torch.randn(patches, 3 * 2 * PATCH**2, generator=random))
        found.setdefault(grid, []).append(torch.tensor([[part.frames, part.height, part.width]]))
    return Prompt(torch.tensor([ids]), {name: torch.cat(values) for name, values in found.items()})


@dataclass
class Given:
    """What the language model is given of a prompt of S tokens.

    embeddings [1, S, hidden]; features: of each DeepStack layer [1, S, hidden], zeros at text; positions [axes, 1, S];
    delta: the next token's position less its slot.
    """

    embeddings: Tensor
    features: list[Tensor]
    positions: Tensor
    visual: Tensor
    delta: int

    @property
    def wide(self) -> Tensor:
        """[1, S, (1 + D) hidden], what a compiled decoder is given."""
        return torch.cat((self.embeddings, *self.features), -1)

    def part(self, begin: int, end: int | None = None) -> Given:
        """Some of its tokens."""
        return Given(
            self.embeddings[:, begin:end], [f[:, begin:end] for f in self.features], self.positions[:, :, begin:end],
            self.visual[:, begin:end], self.delta,
        )  # fmt: skip


@torch.no_grad()
def given_of(model: PreTrainedModel, prompt: Prompt) -> Given:
    inner, ids, pixels = model.model, prompt.ids, prompt.pixels
    embeddings = inner.get_input_embeddings()(ids)
    layers = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    features = [torch.zeros_like(embeddings) for _ in range(layers)]
    for kind, name, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        if name not in pixels:
            continue
        seen = inner.get_image_features(pixels[name], pixels[grid], return_dict=True)
        at = (prompt.kinds == kind)[..., None]
        embeddings = embeddings.masked_scatter(at, torch.cat(seen.pooler_output))
        stacked = [torch.cat(f) for f in getattr(seen, "deepstack_features", [])]
        features = [f.masked_scatter(at, s) for f, s in zip(features, stacked, strict=True)]
    grids = {name: grid for name, grid in pixels.items() if name.endswith("grid_thw")}
    positions, delta = inner.get_rope_index(ids, mm_token_type_ids=prompt.kinds, **grids)
    return Given(embeddings, features, positions, prompt.kinds > 0, int(delta))


def next_token(model: PreTrainedModel, token: int, slot: int, like: Given) -> Given:
    """A generated token that is written to a slot."""
    with torch.no_grad():
        embedding = model.get_input_embeddings()(torch.tensor([[token]]))
    return Given(
        embedding, [torch.zeros_like(embedding) for _ in like.features],
        torch.full((len(like.positions), 1, 1), slot + like.delta), torch.zeros(1, 1, dtype=torch.bool), like.delta,
    )  # fmt: skip


@torch.no_grad()
def full_logits(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """The whole model's logits of every token [1, S, vocabulary], from ids and pixels."""
    model.model.rope_deltas = None  # of another prompt
    return model(input_ids=prompt.ids, mm_token_type_ids=prompt.kinds, **prompt.pixels).logits


@torch.no_grad()
def forward(model: PreTrainedModel, given: Given, cache: DynamicCache) -> Tensor:
    """Logits of every token [1, S, vocabulary] after a cache, from embeddings."""
    features = {}
    if given.features and given.visual.any():
        picked = [f[given.visual] for f in given.features]
        features = {"visual_pos_masks": given.visual, "deepstack_visual_embeds": picked}
    out = model.model.language_model(
        inputs_embeds=given.embeddings, position_ids=given.positions, past_key_values=cache, use_cache=True, **features
    )
    return model.lm_head(out.last_hidden_state)


@torch.no_grad()
def pop_prefill(
    model: PreTrainedModel,
    given: Given,
    pruned: Collection[int],
    *,
    window: int = 1,
    projections: Mapping[int, KVMaps] | None = None,
    bypasses: Mapping[int, Map] | None = None,
) -> tuple[Tensor, DynamicCache]:
    """Logits of the boundary token [1, 1, vocabulary] and the cache after a prompt.

    projections: of pruned layers that have calibrated ones. bypasses: by the last layer of a run. window: how many
    tokens at the end of the prompt take the whole model.
    """
    cache, tokens = DynamicCache(), given.embeddings.shape[1]
    if tokens > window:
        with _skipping(model.model.language_model, pruned, projections or {}, bypasses or {}):
            forward(model, given.part(0, tokens - window), cache)
    return forward(model, given.part(max(0, tokens - window)), cache)[:, -1:], cache


@contextlib.contextmanager
def _skipping(
    decoder: nn.Module, pruned: Collection[int], projections: Mapping[int, KVMaps], bypasses: Mapping[int, Map]
) -> Iterator[None]:
    layers = list(decoder.layers)
    for i in pruned:
        decoder.layers[i] = _Skipped(layers[i], i, projections.get(i), bypasses.get(i))
    try:
        yield
    finally:
        for i in pruned:
            decoder.layers[i] = layers[i]


class _Skipped(nn.Module):
    """A layer that makes cache entries of what it is given, and hands it on, as it is or by a bypass."""

    def __init__(self, layer: nn.Module, index: int, maps: KVMaps | None, bypass: Map | None) -> None:
        super().__init__()
        self.layer, self.index, self.maps, self.bypass = layer, index, maps, bypass

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **named: Any) -> Tensor:
        x, slots = hidden_states, torch.arange(hidden_states.shape[1])[None]
        cache = named.get("cache", named.get("past_key_values"))
        own = self.maps is None
        key, value = own_projections(self.layer, x) if own else (m.apply(x, slots) for m in self.maps)
        cache.update(*cache_entries(self.layer, key, value, position_embeddings), self.index)
        return x if self.bypass is None else x + self.bypass.apply(x, slots)
