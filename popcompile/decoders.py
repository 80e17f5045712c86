"""Which configs are decoders that popcompile can compile: causal LMs with softmax attention in every layer.

Decided from the config's structure where it says enough, and from the tables here where it does not.
"""

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from popcompile.errors import PopcompileError

SUPPORTED = "popcompile supports decoder-only causal LMs of transformers with attention in every layer"

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""The values of `config.layer_types` that are softmax attention over a KV cache."""

NOT_ATTENTION = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "a state-space model"),
    **dict.fromkeys(("rwkv", "xlstm"), "a recurrent model"),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h"), "a state-space hybrid"),
    **dict.fromkeys(("zamba", "zamba2"), "a state-space hybrid"),
    **dict.fromkeys(("recurrent_gemma", "minimax"), "a hybrid of recurrence and attention"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "a hybrid of convolution and attention"),
    "blt": "a byte-latent model of several decoders",
}
"""Model types whose configs do not always say in `layer_types` that a layer is something else than attention."""

DECODER_ANYWAY = frozenset({"gpt_neox", "gpt_neox_japanese"})
"""Decoders whose configs carry an `is_decoder` of False that means nothing."""

OTHER_MODALITIES = ("vision_config", "audio_config", "audio_encoder_config")


def require_decoder(model: str, config: PretrainedConfig) -> None:
    """Refuse a config that popcompile cannot compile.

    Args:
        model: what the user wrote, for the message.
        config: the checkpoint's config. Remote code counts as a causal LM if its `auto_map` names one.

    Raises:
        PopcompileError: naming the architecture, what it is, and what is supported.
    """
    kind = config.model_type
    architecture = (getattr(config, "architectures", None) or [kind])[0]
    named = f"{model}: {architecture}" + (f" (model type {kind})" if architecture != kind else "")
    if config.is_encoder_decoder:
        raise PopcompileError(f"{named} is an encoder-decoder; {SUPPORTED}")
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    causal = kind in CAUSAL_LMS or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if text in CAUSAL_LMS or (causal and any(getattr(config, part, None) is not None for part in OTHER_MODALITIES)):
        decoder = f", here of model type {text}" if text else ""
        raise PopcompileError(
            f"{named} takes more than text; popcompile supports the text decoder alone: "
            f"give a checkpoint of the text decoder{decoder}"
        )
    if kind in NOT_ATTENTION:
        raise PopcompileError(f"{named} is {NOT_ATTENTION[kind]}; {SUPPORTED}")
    if not causal:
        raise PopcompileError(f"{named} has no causal language model; {SUPPORTED}")
    if getattr(config, "is_decoder", None) is False and kind not in DECODER_ANYWAY:
        raise PopcompileError(f"{named} is an encoder (config.is_decoder is false); {SUPPORTED}")
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS):
        raise PopcompileError(f"{named} has layers of type {', '.join(other)}; {SUPPORTED}")
