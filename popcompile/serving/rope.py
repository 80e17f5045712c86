"""What a model's RoPE asks of those that cut prompts or put rows together."""

from __future__ import annotations

from transformers import PretrainedConfig


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether a token's keys depend on how long the longest row of its call is. With longrope they do: there are other
    frequencies beyond the length of pretraining.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type", kind.get("type")) == "longrope" for kind in kinds)
