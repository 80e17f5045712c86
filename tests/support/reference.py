"""POP prefill written from transformers' modules alone, to compare against: DESIGN section 2, second formulation.

Prefill the context tokens, pruned layers making only their K/V cache entries, then take one full decode step with the
boundary token, or with a window of tokens that ends with it. Calibrated maps take the place of the layers' own
projections and of the way past a run of pruned layers. Uses nothing of popcompile.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def without_layers(model: PreTrainedModel, dropped: Collection[int]) -> PreTrainedModel:
    """transformers' own model with layers taken out."""
    model = copy.deepcopy(model)
    kept = [i for i in range(model.config.num_hidden_layers) if i not in dropped]
    layers = [model.model.layers[i] for i in kept]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model


class Map(NamedTuple):
    """weight @ x / rms(x) + bias, and `sink` for the first token of a sequence."""

    weight: torch.Tensor  # [out, hidden]
    bias: torch.Tensor  # [out]
    sink: torch.Tensor  # [out]

    def apply(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[1, S, out] for x [1, S, hidden] at positions [1, S]."""
        out = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) @ self.weight.T + self.bias
        return torch.where(positions[..., None] == 0, self.sink, out)


#: a layer's map to keys, and to values, at the projections' output
KVMaps = tuple[Map, Map]


@torch.no_grad()
def pop_prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pruned: Collection[int],
    cache: DynamicCache | None = None,
    projections: Mapping[int, KVMaps] | None = None,
    bypasses: Mapping[int, Map] | None = None,
    window: int = 1,
) -> tuple[torch.Tensor, DynamicCache]:
    """Logits of the boundary token [1, 1, vocabulary] and the cache after the prompt input_ids [1, S].

    projections: of pruned layers that have calibrated ones. bypasses: by a run's first layer. window: how many tokens
    at the end of the prompt take the whole model.
    """
    cache = cache if cache is not None else full_cache(model)
    context = input_ids[:, :-window]
    if context.shape[1]:
        _prefill_context(model, context, pruned, cache, projections or {}, bypasses or {})
    out = model(input_ids=input_ids[:, -window:], past_key_values=cache, use_cache=True)
    return out.logits[:, -1:], cache


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache that keeps every position, of sliding-window layers too."""
    return DynamicCache()


def _prefill_context(
    model: PreTrainedModel,
    context: torch.Tensor,
    pruned: Collection[int],
    cache: DynamicCache,
    projections: Mapping[int, KVMaps],
    bypasses: Mapping[int, Map],
) -> None:
    decoder = model.model
    config = decoder.config
    past = cache.get_seq_length()
    positions = torch.arange(past, past + context.shape[1])[None]
    x = decoder.embed_tokens(context)
    arguments = {"config": config, "inputs_embeds": x, "attention_mask": None, "past_key_values": cache}
    arguments["position_ids"] = positions
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    masks = {"full_attention": create_causal_mask(**arguments)}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    rope = {}
    for kind in set(kinds):
        by_kind = isinstance(config.rope_parameters, dict) and kind in config.rope_parameters
        rope[kind] = decoder.rotary_emb(x, positions, kind) if by_kind else decoder.rotary_emb(x, positions)
    first = 0  # of the run of pruned layers that a pruned layer is in
    for index, layer in enumerate(decoder.layers):
        if index in pruned:
            if index - 1 not in pruned:
                first = index
            if index in projections:
                key, value = (m.apply(x, positions) for m in projections[index])
            else:
                key, value = own_projections(layer, x)
            cache.update(*cache_entries(layer, key, value, rope[kinds[index]]), index)
            if index + 1 not in pruned and first in bypasses:
                x = x + bypasses[first].apply(x, positions)
        else:
            x = layer(
                x,
                attention_mask=masks[kinds[index]],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rope[kinds[index]],
            )


def own_projections(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's projected keys and values [1, S, kv_heads x head] of the wrong hidden state, by its own weights."""
    attention = layer.self_attn
    normed = layer.input_layernorm(x) if hasattr(layer, "input_layernorm") else x
    if hasattr(attention, "qkv_proj"):
        size = attention.num_key_value_heads * attention.head_dim
        key, value = attention.qkv_proj(normed)[..., -2 * size :].chunk(2, -1)
        return key, value
    return attention.k_proj(normed), attention.v_proj(normed)


def cache_entries(
    layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as the cache holds them [1, kv_heads, S, head]."""
    attention = layer.self_attn
    shape = (*key.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, "k_norm", None)
    over_all_heads = norm is not None and norm.weight.shape[0] != attention.head_dim  # OLMo 2
    if over_all_heads:
        key = norm(key)
    key, value = (t.view(shape).transpose(1, 2) for t in (key, value))
    if norm is not None and not over_all_heads:
        key = norm(key)
    cos, sin = (t[:, None] for t in rope)
    half = key.shape[-1] // 2
    rotated = torch.cat((-key[..., half:], key[..., :half]), dim=-1)
    return key * cos + rotated * sin, value
