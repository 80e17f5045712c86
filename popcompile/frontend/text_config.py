"""The configs that a multimodal model's holds inside: of its text decoder, and of its vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.frontend.decoders import SUPPORTED

#: fields of the whole model's config that hold for its text decoder, where it gives them
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")


def check_text_config(subject: str, raw: Mapping[str, Any]) -> None:
    """Raise PopcompileError for a text_config in config.json that no library should interpret.

    subject: what the message begins with, "MODEL: config.json".
    """
    content = raw.get("text_config")
    if content is None:  # the fields may stand in the whole model's config: transformers knows
        return
    if not isinstance(content, dict):
        raise PopcompileError(f"{subject}: text_config is {str(content)[:40]!r}, not an object; fix it")
    kind = content.get("model_type")
    if kind is None:  # the whole model's type says which
        return
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise PopcompileError(
            f"{subject}: transformers {transformers.__version__} does not know the text decoder's model type"
            f" {str(kind)[:40]}; {SUPPORTED}"
        )
    _check_fields(f"{subject}: text_config", content, CONFIG_MAPPING[kind])


def check_vision_config(subject: str, raw: Mapping[str, Any], whole: type[PretrainedConfig]) -> None:
    """As `check_text_config`, of a vision_config. whole: the class of the model's config."""
    content = raw.get("vision_config")
    if content is None:
        return
    if not isinstance(content, dict):
        raise PopcompileError(f"{subject}: vision_config is {str(content)[:40]!r}, not an object; fix it")
    kind = content.get("model_type")
    if kind is not None and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise PopcompileError(
            f"{subject}: transformers {transformers.__version__} does not know the vision tower's model type"
            f" {str(kind)[:40]}; fix it"
        )
    cls = CONFIG_MAPPING[kind] if kind is not None else type(whole().vision_config)
    _check_fields(f"{subject}: vision_config", content, cls)


def _check_fields(subject: str, content: Mapping[str, Any], cls: type[PretrainedConfig]) -> None:
    config_schema.check_names(subject, content, cls)
    config_schema.check_fields(subject, content, config_schema.config_hints(cls))
    config_schema.check_end(subject, content)


def text_config(whole: PretrainedConfig) -> PretrainedConfig | None:
    """The text decoder's config, with what the whole model's says of it; None for a config that has none inside."""
    inside = getattr(whole, "text_config", None)
    if not isinstance(inside, PretrainedConfig):
        return None
    config = deepcopy(inside)
    given = {field: getattr(whole, field, None) for field in _OF_THE_WHOLE}
    if isinstance(padding := given["pad_token_id"], int) and padding >= config.vocab_size:
        given["pad_token_id"] = None  # the default of a class of configs
    for field, value in given.items():
        if value is not None:
            setattr(config, field, value)
    if not config.architectures and isinstance(name := CAUSAL_LMS.get(config.model_type), str):
        config.architectures = [name]
    return config
