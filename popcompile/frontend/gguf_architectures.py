"""Which GGUF architectures are read, and what each of their metadata keys means: data.

llama.cpp keeps part of what a model computes in its code and part in the file. Both stand here for every
architecture, so that a key that is neither here nor in `NEUTRAL` is refused by name rather than dropped. The meaning
of keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and src/models in
https://github.com/ggml-org/llama.cpp for what its code adds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_DECODER = _SIZES | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_EXPERT_PARTS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}
_OFFSET_NORMS = {r".*norm\.weight": "subtract_one"}


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture becomes a config and parameters of transformers.

    Attributes:
        model_type: transformers' name for it.
        fields: metadata key (without the architecture's name) -> config field; every one must be in the file.
        optional: the same for keys that may be absent: llama.cpp then leaves out what they set (None).
        fixed: config fields that llama.cpp's code fixes.
        flags: a tensor of a block -> the config field that says whether the model has it.
        absent_flags: a tensor of a block -> the config field that is true without it.
        neutral: as `NEUTRAL`, for this architecture alone.
        changed: pattern of tensor names -> what turns such a tensor into transformers' (`popcompile.frontend.gguf`).
        merged: end of a parameter's name -> the tensors of a block that it is made of, joined along dimension 1.
        rope: whether positions are rotations.
        partial_rotary: whether a part of a head's dimensions may be rotated.
        rope_factors: tensors of RoPE factors that the architecture takes: "llama3" or "longrope".
        local_rope: whether sliding layers have an own, unscaled RoPE base.
        window_period: every such layer has full attention, the others a sliding window. 0: one kind of layers.
        width_scaled: with this many layers, attention is scaled by hidden size / heads instead of the head size.
    """

    model_type: str
    fields: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    absent_flags: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rope: bool = True
    partial_rotary: bool = False
    rope_factors: str = ""
    local_rope: bool = False
    window_period: int = 0
    width_scaled: int = 0


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        _DECODER,
        flags={"attn_output.bias": "attention_bias", "ffn_up.bias": "mlp_bias"},
        neutral={"tensor_data_layout": ("Meta AI original pth",)},  # rows of q and k in llama.cpp's order, as always
        changed={r".*\.attn_q\..*": "unpermute_q", r".*\.attn_k\..*": "unpermute_k"},
        rope_factors="llama3",
    ),
    "qwen2": Architecture("qwen2", _DECODER),
    "qwen3": Architecture("qwen3", _DECODER, flags={"attn_output.bias": "attention_bias"}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _DECODER | _EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        fixed={"norm_topk_prob": False},
        neutral={"expert_weights_norm": (False,)},
        changed={r".*\.ffn_gate_inp_shexp\.weight": "as_row"},
        merged=_EXPERT_PARTS,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _DECODER | _EXPERTS,
        fixed={"norm_topk_prob": True},
        flags={"attn_output.bias": "attention_bias"},
        neutral={"expert_weights_norm": (True,)},
        merged=_EXPERT_PARTS,
    ),
    "phi3": Architecture(
        "phi3",
        _DECODER,
        optional={"attention.sliding_window": "sliding_window"},
        partial_rotary=True,
        rope_factors="longrope",
    ),
    "gemma2": Architecture(
        "gemma2",
        _DECODER
        | {"attention.sliding_window": "sliding_window"}
        | {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
        changed=_OFFSET_NORMS,
        window_period=2,
        width_scaled=46,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _DECODER | {"attention.sliding_window": "sliding_window"},
        optional={"final_logit_softcapping": "final_logit_softcapping"},
        changed=_OFFSET_NORMS,
        local_rope=True,
        window_period=6,
        width_scaled=62,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        _SIZES | {"attention.layer_norm_epsilon": "norm_epsilon"},
        flags={"attn_output.bias": "use_bias"},
    ),
    "stablelm": Architecture(
        "stablelm",
        _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        flags={"attn_q.bias": "use_qkv_bias"},
        absent_flags={"ffn_norm.weight": "use_parallel_residual"},
        neutral={"use_parallel_residual": (True, False)},  # llama.cpp looks for the tensor, as above
        partial_rotary=True,
    ),
    "nemotron": Architecture(
        "nemotron",
        _SIZES | {"attention.layer_norm_epsilon": "norm_eps"},
        flags={"attn_output.bias": "attention_bias", "ffn_up.bias": "mlp_bias"},
        changed=_OFFSET_NORMS,
        partial_rotary=True,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        changed={r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight": "transpose"},
        rope=False,
    ),
}

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax, which all architectures here have
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.finetuned": (True, False),  # says how the model was trained, not what it computes
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),  # llama.cpp's default: what the type asks for
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
"""Keys of an architecture that are not read -> the values with which they change nothing."""

TOKENIZER_READ: Mapping[str, type | str] = {
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": "texts",
    "tokenizer.ggml.merges": "texts",
    "tokenizer.ggml.scores": "numbers",
    "tokenizer.ggml.token_type": "numbers",
    "tokenizer.ggml.bos_token_id": int,
    "tokenizer.ggml.eos_token_id": int,
    "tokenizer.ggml.unknown_token_id": int,
    "tokenizer.ggml.padding_token_id": int,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.chat_template": str,
}
"""What transformers builds the tokenizer from, and of which type it has to be."""

TOKENIZER_SILENT = frozenset(
    "tokenizer." + key
    for key in (
        "chat_templates", "huggingface.json", "ggml.added_tokens", "ggml.token_type_count", "ggml.eot_token_id",
        "ggml.eog_token_ids", "ggml.eos_token_ids", "ggml.eom_token_id",
        "ggml.seperator_token_id", "ggml.mask_token_id", "ggml.cls_token_id",
        "ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id", "ggml.fim_pre_token_id",
        "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id",
        "ggml.fim_sep_token_id",
    )
)  # fmt: skip
"""Names of tokens for purposes that a text prompt does not have, and second spellings: no text is encoded otherwise."""

TOKENIZER_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "tokenizer.ggml.escape_whitespaces": (True,),
}

SPACE_PREFIX: Mapping[str, bool] = {"gemma2": False, "gemma3": False}
"""Whether transformers' sentencepiece tokenizer of the architecture puts a space before a text; others do."""

OWN_SPLITS = frozenset(
    {
        "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "tekken", "qwen2",
        "deepseek-r1-qwen", "kormo", "megrez", "gpt-4o", "kanana2",
    }
)  # fmt: skip
"""Values of tokenizer.ggml.pre whose way to split a text transformers knows."""

GPT2_SPLITS = frozenset(
    {"default", "gpt-2", "gpt2", "mpt", "olmo", "phi-2", "refact", "smollm", "starcoder", "command-r", "codeshell"}
)
"""Those that split as GPT-2 does, with single digits at most: vocabularies of the latter have no merges of digits."""

DESCRIPTIONS = ("general.", "quantize.", "imatrix.", "mradermacher.")
"""Beginnings of keys that say where a file comes from, never what the model computes."""
