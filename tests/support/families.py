"""Tiny models of the decoder families, and POP prefill of any of them by hooks on transformers' modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel

_SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_SLIDING, _FULL = "sliding_attention", "full_attention"
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [2 + 0.7 * i for i in range(8)],
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}

#: name -> what the family has that Llama 2 has not, model_type, and fields of its config
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama 2": ("", "llama", {"num_key_value_heads": 4}),
    "Llama 3.1": ("grouped queries, llama3 RoPE scaling", "llama", {"rope_parameters": _LLAMA3}),
    "Llama 3.2": ("the same, tied embeddings", "llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "Mistral": ("sliding window", "mistral", {"sliding_window": 8}),
    "Qwen2.5": ("biases of q, k, v", "qwen2", {}),
    "Qwen3": ("q and k norms", "qwen3", {}),
    "Gemma 2": (
        "softcaps, alternating windows, post-norms",
        "gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": [_SLIDING, _FULL] * 2},
    ),
    "Gemma 3": (
        "q and k norms, two RoPE bases",
        "gemma3_text",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING]},
    ),
    "Phi-3": ("fused qkv and gate_up", "phi3", {}),
    "Phi-3-128k": (
        "the same, longrope RoPE scaling",
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16},
    ),
    "Phi-4-mini": (
        "the same, partial rotary",
        "phi3",
        {
            "rope_parameters": _LONGROPE | {k: v[:4] for k, v in _LONGROPE.items() if isinstance(v, list)},
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "SmolLM3": ("layers without RoPE", "smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "Granite": (
        "multipliers",
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "OLMo 2": ("post-norms, q and k norms over all heads", "olmo2", {}),
    "GPT-NeoX": (
        "LayerNorm, parallel residual, partial rotary, fused qkv",
        "gpt_neox",
        {"rotary_pct": 0.5, "num_key_value_heads": None, "head_dim": None},
    ),
    "GPT-2": (
        "LayerNorm, learned positions",
        "gpt2",
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64},
    ),
    "Mixtral": ("mixture of experts", "mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "Qwen2-MoE": (
        "experts, a shared one, dense layers",
        "qwen2_moe",
        _EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    ),
    "Qwen3-MoE": (
        "experts, q and k norms, a dense layer",
        "qwen3_moe",
        _EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "GLM-4.5": (
        "experts chosen by sigmoids, a shared one",
        "glm4_moe",
        _EXPERTS | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "gpt-oss": (
        "attention sinks, windows, experts with biases",
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "layer_types": [_SLIDING, _FULL] * 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
                "truncate": False,
            },
        },
    ),
}


def family_config(name: str) -> PreTrainedConfig:
    _, model_type, changes = FAMILIES[name]
    fields = {k: v for k, v in (_SIZES | changes).items() if v is not None}
    if model_type == "gpt2":
        fields = {k: v for k, v in fields.items() if k not in _SIZES or k in ("vocab_size",) or k.endswith("token_id")}
    return AutoConfig.for_model(model_type, **fields)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The one list of as many modules as the model has layers, or the text decoder of a multimodal model."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)


@torch.no_grad()
def pop_by_hooks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    pruned: Collection[int],
    cache: DynamicCache | None = None,
    *,
    window: int = 1,
) -> tuple[torch.Tensor, DynamicCache]:
    """Logits [1, 1, vocabulary] of the boundary token and the cache after ids [1, S].

    A pruned layer runs on the context tokens for its cache entries alone: what it hands on is what it was given.
    window: how many tokens at the end take the whole model.
    """
    cache = cache if cache is not None else DynamicCache()

    def hand_on(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
        x = given[0] if given else named["hidden_states"]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    if ids.shape[1] > window:
        layers = layers_of(model)
        hooks = [layers[i].register_forward_hook(hand_on, with_kwargs=True) for i in pruned]
        try:
            model(ids[:, :-window], past_key_values=cache, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
    return model(ids[:, -window:], past_key_values=cache, use_cache=True).logits[:, -1:], cache
