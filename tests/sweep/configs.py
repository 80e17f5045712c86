"""A tiny config of every type in transformers' causal LM mapping, and the variants that its fields allow.

A config class is shrunk by the names of its fields. Lists with an entry for every layer keep all kinds of entries that
the class's own defaults have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from popcompile.errors import PopcompileError
from popcompile.frontend.decoders import WITH_IMAGES, require_decoder

from .worker import Case

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
_EXTRA: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dory": {  # counts blocks of attention and blocks of feed-forward layers
        "num_hidden_layers": 2 * LAYERS,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "sliding_attention", "mlp", "full_attention", "mlp"],
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1},
}

#: model type -> fields without which its class's defaults do not pass its own checks
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
}


def cases() -> list[Case]:
    """Every type, and variants of those whose config is not refused as it is."""
    found = []
    for model_type in model_types():
        found.append(Case(model_type, "default", {}))
        try:
            defaults = default_config(model_type)
            if getattr(defaults, "is_decoder", None) is not False:
                require_decoder(model_type, defaults)
            changes = variants(model_type)
        except (PopcompileError, ValueError):  # a tiny config does not pass the class's checks: see `result_of`
            continue
        found += [Case(model_type, name, changed) for name, changed in changes.items() if changed]
    return found


def model_types() -> list[str]:
    """Every type of the causal LM mapping of the installed transformers, but for popcompile's own entry, and for those
    that are compiled with their images, which have tests of their own.
    """
    return sorted(t for t in CAUSAL_LMS if t in CONFIG_MAPPING and t not in WITH_IMAGES)


def default_config(model_type: str) -> PreTrainedConfig:
    """The config class's own defaults, which are a published model's."""
    return CONFIG_MAPPING[model_type](**_NEEDED.get(model_type, {}))


def tiny_config(model_type: str, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The type's config with three small layers, and `changes` of it."""
    try:
        defaults = default_config(model_type).to_dict()
    except Exception:  # a class whose defaults do not pass its own checks
        defaults = {}
    layers = max((v for k, v in defaults.items() if _SIZES.get(k) == LAYERS and isinstance(v, int)), default=0)
    fields: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in ("head_dim", "num_key_value_heads") or (
            name in _SIZES and (value is not None or name.endswith("token_id")) and not isinstance(value, (list, dict))
        ):
            fields[name] = _SIZES[name]
        elif isinstance(value, list) and layers > LAYERS and len(value) == layers:
            fields[name] = _few(value)
    fields |= _EXTRA.get(model_type, {}) | dict(changes or {})
    return AutoConfig.for_model(model_type, **fields)


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


_BIASES = (
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "use_bias",
    "qkv_bias",
    "bias",
    "use_qkv_bias",
    "no_bias",
)
_PARALLEL = ("use_parallel_residual", "parallel_attn")
_QK_NORMS = ("qk_layernorm", "use_qk_norm")
_TOKENS = {"original_max_position_embeddings": 16}
#: kinds of RoPE, by transformers' names
_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _TOKENS,
    "yarn": {"factor": 4.0} | _TOKENS,
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0, "short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 12,
    },
}  # fmt: skip
#: types that are tried with every kind of RoPE; every other one is with one of them
_ALL_ROPE = ("llama", "phi3")


def variants(model_type: str) -> dict[str, dict[str, Any]]:
    """Changes of the tiny config by a name for them: what a config can say of layers, attention and positions."""
    config = tiny_config(model_type)
    fields = config.to_dict()
    found: dict[str, dict[str, Any]] = {"default": {}}
    tied = fields.get("tie_word_embeddings")
    found["untied" if tied else "tied"] = {"tie_word_embeddings": not tied}
    for name, group in (("biases", _BIASES), ("parallel residual", _PARALLEL), ("q and k norms", _QK_NORMS)):
        if flipped := {f: not fields[f] for f in group if isinstance(fields.get(f), bool)}:
            opposite = any(fields[f] for f in flipped)
            found[f"no {name}" if opposite else name] = flipped
    for field in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(fields.get(field), int):
            found["multi-query"] = {field: 1}
            found["multi-head"] = {field: 4}
    if isinstance(fields.get("multi_query"), bool):
        found["multi-head" if fields["multi_query"] else "multi-query"] = {"multi_query": not fields["multi_query"]}
    if "sliding_window" in fields and "layer_types" not in fields:
        window = None if fields["sliding_window"] else 8
        found["window" if window else "no window"] = {"sliding_window": window}
    if isinstance(types := fields.get("layer_types"), list) and "sliding_window" in fields:
        sliding, full = "sliding_attention", "full_attention"
        mixed = [full, sliding, full] if types != [full, sliding, full] else [sliding, full, sliding]
        found["other windows"] = {"layer_types": mixed, "sliding_window": 8}
        if "use_sliding_window" in fields:
            found["other windows"]["use_sliding_window"] = True
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        kinds = list(_ROPE)
        chosen = kinds if model_type in _ALL_ROPE else [kinds[sum(map(ord, model_type)) % len(kinds)]]
        for kind in chosen:
            found[f"RoPE {kind}"] = {"rope_parameters": {**rope, "rope_type": kind, **_ROPE[kind]}}
    if fields.get("is_decoder") is False:
        found["decoder"] = {"is_decoder": True}
    for field, value in (("use_bidirectional_attention", True), ("is_causal", False), ("add_cross_attention", True)):
        if field in fields or field == "is_causal":
            found[field] = {field: value}
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if field in fields:
            found[f"{field} {'off' if fields[field] else 'on'}"] = {field: None if fields[field] else 5.0}
    return found
