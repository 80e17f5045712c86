"""Tiny multimodal models whose text decoder is converted alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from random_weights import randomize
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_CLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_MROPE8 = {"head_dim": 8, "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [2, 1, 1]}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SLIDING = {
    "sliding_window": 8, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip

#: model_type -> what the text decoder's config adds or changes, and the vision encoder's config
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (_SLIDING, _CLIP | {"model_type": "siglip_vision_model"}),
    "qwen2_5_vl": (_MROPE8, _QWEN_VISION | {"fullatt_block_indexes": [0]}),
    "qwen3_vl": (_MROPE, _QWEN_VISION | {"deepstack_visual_indexes": [0]}),
    "mistral3": ({"model_type": "mistral"}, _CLIP | {"model_type": "pixtral", "head_dim": 8}),
    "qwen2_vl": (_MROPE8, _QWEN_VISION | {"embed_dim": 16}),
    "qwen3_vl_moe": (_MROPE | _EXPERTS, _QWEN_VISION | {"deepstack_visual_indexes": [0]}),
    "llava": ({"model_type": "llama"}, _CLIP | {"model_type": "clip_vision_model"}),
    "internvl": ({"model_type": "qwen2"}, _CLIP | {"model_type": "internvl_vision"}),
    "idefics3": ({"model_type": "llama"}, _CLIP | {"model_type": "idefics3_vision"}),
}  # fmt: skip


def multimodal_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    text, vision = MULTIMODAL[model_type]
    return AutoConfig.for_model(model_type, text_config=_TEXT | text, vision_config=vision, **changes)


def multimodal_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own module; every layer of its text decoder matters, and nothing else is a number.

    So whatever is computed from the image encoder's weights, or reads them where it should not, shows.
    """
    torch.manual_seed(0)
    model = randomize(AutoModelForImageTextToText.from_config(config).eval())
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in text:
                parameter.fill_(torch.nan)
    return model


def save_multimodal(folder: Path, model_type: str, **changes: Any) -> PreTrainedModel:
    """Save a tiny model as transformers does; returns it. changes: of the whole model's config."""
    model = multimodal_model(multimodal_config(model_type, **changes))
    model.save_pretrained(folder)
    return model
