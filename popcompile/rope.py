"""What a config says of its model's RoPE. It imports nothing of popcompile: every folder may use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig


def rope_types(config: PretrainedConfig) -> Iterator[Any]:
    """The types of RoPE that a decoder's config names, one for all layers or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict):
            for nested in (parameters, *parameters.values()):
                if isinstance(nested, dict) and (kind := nested.get("rope_type", nested.get("type"))) is not None:
                    yield kind


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether a token's keys depend on how long the longest row of its call is. With longrope they do: there are other
    frequencies beyond the length of pretraining.
    """
    return "longrope" in rope_types(config.get_text_config())
