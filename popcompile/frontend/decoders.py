"""Which configs are decoders that popcompile can compile: causal LMs with softmax attention in every layer.

Decided from the config's structure where it says enough, and from the tables here where it does not.
"""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WRITE_TEXT

from popcompile.errors import PopcompileError
from popcompile.frontend.causal_lm import is_headless

SUPPORTED = "popcompile supports decoder-only causal LMs of transformers with attention in every layer"

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""The values of `config.layer_types` that are softmax attention over a KV cache."""

OTHER_TYPES = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "a state-space model"),
    **dict.fromkeys(("rwkv", "xlstm"), "a recurrent model"),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h"), "a state-space hybrid"),
    **dict.fromkeys(("zamba", "zamba2"), "a state-space hybrid"),
    **dict.fromkeys(("recurrent_gemma", "minimax"), "a hybrid of recurrence and attention"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "a hybrid of convolution and attention"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "a drafter that reads another model's cache"),
    "bloom": "a model whose positions are ALiBi's biases of attention",
    "blt": "a byte-latent model of several decoders",
    "reformer": "a model of attention by locality-sensitive hashing",
    "trocr": "the decoder of an encoder-decoder",
    "xlm": "a model of several objectives with an attention of its own",
    "xlnet": "a permutation language model",
    "cohere_compass_text": "a decoder whose rotary positions have three axes (M-RoPE)",
    "cpmant": "a model whose positions are learned biases of attention",
    "diffllama": "a model of differential attention",
    **dict.fromkeys(
        ("falcon", "gpt_neo"), "a model whose attention does not go through transformers' AttentionInterface"
    ),
    **dict.fromkeys(
        ("aria_text", "dbrx", "jetmoe"), "a mixture of experts that do not go through transformers' ExpertsInterface"
    ),
}
"""Model types whose configs do not say, or not always, what they are other than layers of softmax attention, and those
that transformers has no way to trace for."""

DECODER_ANYWAY = frozenset({"gpt_neox", "gpt_neox_japanese"})
"""Decoders whose configs carry an `is_decoder` of False that means nothing."""

_GIVEN: Callable[[Any], bool] = bool
OTHER_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kv_lora_rank": (_GIVEN, "multi-head latent attention (MLA)"),
    "num_kv_shared_layers": (_GIVEN, "layers that read another layer's keys and values"),
    "alibi": (_GIVEN, "ALiBi's biases for positions"),
    "use_bidirectional_attention": (lambda value: value is True or value == "all", "bidirectional attention"),
    "is_causal": (lambda value: value is False, "bidirectional attention"),
    "prefix_lm": (_GIVEN, "prefixes that are attended to in both directions"),
    "add_cross_attention": (_GIVEN, "cross-attention"),
    **dict.fromkeys(
        ("n_recurrent_loops", "H_cycles"), (lambda value: value != 1 and bool(value), "layers that run again")
    ),
}
"""Fields of configs that ask for what is not compiled: whether a value does, and what it is.

What a field does to masks and to the arguments of attention is also seen when the model is traced (masks.py); these are
refused before that, and by their names.
"""

WITH_IMAGES = frozenset({"gemma3", "qwen3_vl"})
"""Vision-language models that are compiled whole; popcompile/vision/towers.py has what is their own."""

PARTS_OF_DECODERS = frozenset({"attn_config", "ffn_config"})
"""Configs inside a decoder's config that are no models of their own."""


def require_decoder(model: str, config: PretrainedConfig, whole: PretrainedConfig | None = None) -> None:
    """Refuse a config that popcompile cannot compile.

    Args:
        model: what the user wrote, for the message.
        config: the checkpoint's config. Remote code counts as a causal LM if its `auto_map` names one.
        whole: of the multimodal model whose text decoder `config` describes, if it is one.

    Raises:
        PopcompileError: naming the architecture, what it is, and what is supported.
    """
    kind = config.model_type
    called = architecture(config)
    named = f"{model}: {called}" + (f" (model type {kind})" if called != kind else "")
    if config.is_encoder_decoder:
        raise PopcompileError(f"{named} is an encoder-decoder; {SUPPORTED}")
    if kind in OTHER_TYPES:
        raise PopcompileError(f"{named} is {OTHER_TYPES[kind]}; {SUPPORTED}")
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    if kind in WITH_IMAGES:
        _require_known_layers(named, config.get_text_config(decoder=True))
        return
    causal = kind in CAUSAL_LMS or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if _is_text_decoder(text, config):
        raise PopcompileError(
            f"{named} takes more than text; popcompile compiles {', '.join(sorted(WITH_IMAGES))} with images, and of"
            f" others the text decoder alone, here of model type {text}: add --text-only"
        )
    if causal and any(_parts(config)):
        raise PopcompileError(
            f"{named} takes more than text; popcompile supports the text decoder alone: give a checkpoint of it"
        )
    if not causal and not (whole and _is_text_decoder(kind, whole)):
        raise PopcompileError(f"{named} has no causal language model; {SUPPORTED}")
    _require_known_layers(named, config)


def _require_known_layers(named: str, config: PretrainedConfig) -> None:
    """Refuse a decoder's config that asks for other layers than softmax attention and feed-forward blocks, alike.

    named: the model, for the message.
    """
    if getattr(config, "is_decoder", None) is False and config.model_type not in DECODER_ANYWAY:
        raise PopcompileError(f"{named} is an encoder (config.is_decoder is false); {SUPPORTED}")
    if getattr(config, "is_heterogeneous", False):
        raise PopcompileError(f"{named} has layers of different sizes (config.per_layer_config); {SUPPORTED}")
    if other := sorted({str(t) for t in getattr(config, "layer_types", None) or ()} - ATTENTION_LAYERS):
        raise PopcompileError(f"{named} has layers of type {', '.join(other)}; {SUPPORTED}")
    for field, (asks, what) in OTHER_FIELDS.items():
        for place, holder in (("config", config), ("config.attn_config", getattr(config, "attn_config", None))):
            if asks(getattr(holder, field, None)):
                raise PopcompileError(f"{named} has {what} ({place}.{field}); {SUPPORTED}")


def architecture(config: PretrainedConfig) -> str:
    """The class that a config names, or its model type where it names none."""
    names = getattr(config, "architectures", None)
    return str(names[0]) if isinstance(names, list) and names else str(config.model_type)


def _is_text_decoder(kind: str | None, whole: PretrainedConfig) -> bool:
    """Whether transformers has a causal LM of the type or, in a model that writes text, a text model without its head.

    whole: of that model.
    """
    return kind in CAUSAL_LMS or (kind is not None and is_headless(kind) and whole.model_type in WRITE_TEXT)


def _parts(config: PretrainedConfig) -> Iterator[str]:
    """Fields of a config that are configs of models: an image encoder's, or the text decoder's beside one."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and name not in PARTS_OF_DECODERS:
            yield name
