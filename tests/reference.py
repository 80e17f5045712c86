"""POP prefill written from transformers' modules alone, to compare against: DESIGN section 2, second formulation.

Prefill the context tokens, pruned layers making only their K/V cache entries, then take one full decode step with the
boundary token. Uses nothing of popcompile.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


@torch.no_grad()
def pop_prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, pruned: Collection[int], cache: DynamicCache | None = None
) -> tuple[torch.Tensor, DynamicCache]:
    """Logits of the boundary token [1, 1, vocabulary] and the cache after the prompt input_ids [1, S]."""
    cache = cache if cache is not None else full_cache(model)
    context = input_ids[:, :-1]
    if context.shape[1]:
        _prefill_context(model, context, pruned, cache)
    out = model(input_ids=input_ids[:, -1:], past_key_values=cache, use_cache=True)
    return out.logits, cache


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache that keeps every position, of sliding-window layers too."""
    return DynamicCache()


def _prefill_context(
    model: PreTrainedModel, context: torch.Tensor, pruned: Collection[int], cache: DynamicCache
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
    for index, layer in enumerate(decoder.layers):
        if index in pruned:
            key, value = _project(layer, x, rope[kinds[index]])
            cache.update(key, value, index)
        else:
            x = layer(
                x,
                attention_mask=masks[kinds[index]],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rope[kinds[index]],
            )


def _project(
    layer: torch.nn.Module, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values [1, kv_heads, S, head] of the wrong hidden state, by its own weights."""
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    shape = (*x.shape[:2], -1, attention.head_dim)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    cos, sin = (t[:, None] for t in rope)
    half = key.shape[-1] // 2
    rotated = torch.cat((-key[..., half:], key[..., :half]), dim=-1)
    return key * cos + rotated * sin, value
