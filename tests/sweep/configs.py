"""A tiny config of every type in transformers' causal LM mapping, and the variants that its fields allow.

A config class is shrunk by the names of its fields. Lists with an entry for every layer keep all kinds of entries that
the class's own defaults have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 3

#: field -> a small value
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "output_vocab_size"), 64),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "dim_model_base", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("swa_head_dim", "global_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"), 64),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "sliding_window_size"), 8),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("vocab_size_per_layer_input",), 64),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    **dict.fromkeys(("query_pre_attn_scalar",), 16),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_nextn_predict_layers": 0,
}  # fmt: skip

#: model type -> fields that its names do not tell
_EXTRA: dict[str, dict[str, Any]] = {}


def model_types() -> list[str]:
    """Every type of the causal LM mapping of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(model_type: str) -> PreTrainedConfig:
    """The config class's own defaults, which are a published model's."""
    return CONFIG_MAPPING[model_type]()


def tiny_config(model_type: str, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The type's config with three small layers, and `changes` of it; a change to None leaves a field to the class."""
    try:
        defaults = default_config(model_type).to_dict()
    except Exception:  # a class whose defaults do not pass its own checks
        defaults = {}
    layers = max((v for k, v in defaults.items() if _SIZES.get(k) == LAYERS and isinstance(v, int)), default=0)
    fields: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in _SIZES and (value is not None or name.endswith("token_id")) and not isinstance(value, (list, dict)):
            fields[name] = _SIZES[name]
        elif isinstance(value, list) and layers > LAYERS and len(value) == layers:
            fields[name] = _few(value)
    fields |= _EXTRA.get(model_type, {}) | dict(changes or {})
    return AutoConfig.for_model(model_type, **{k: v for k, v in fields.items() if not isinstance(v, _Absent)})


class _Absent:
    """A field that the class's own default stands for."""


ABSENT = _Absent()


def _few(values: list[Any]) -> list[Any]:
    """As many entries as there are layers, with every kind that the list has, in its order."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    kinds = kinds[:LAYERS]
    while len(kinds) < LAYERS:
        kinds.insert(0, kinds[0])
    return kinds
