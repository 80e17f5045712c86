"""genai_config.json: what onnxruntime-genai needs to load the package as it is.

The unified layout is a decoder of one graph. The split layout is a "decoder-pipeline": prefill.onnx runs on prompts,
decode.onnx on single tokens; prefill stands first, for genai reads the shape of the logits from the first stage. The
cache is one buffer, which the graphs write in place. Sliding windows need no entry: GroupQueryAttention applies them
inside the graphs.

With images (genai_images.py) the decoder is one graph in both layouts, for genai's pipelines take none: prefill.onnx,
which runs the whole model on single tokens.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from .genai_images import Images, image_sections
from .io_names import TEXT_INPUTS, input_names, output_names, token_names
from .providers import PROVIDERS

#: model types that are types of decoders in genai 0.18 as well. All take these graphs, so any other is a "llama"; phi3
#: too, for genai encodes its text again where that becomes too long for the short RoPE factors.
_TYPES = {
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "qwen2", "qwen3",
    "smollm3",
}  # fmt: skip

#: the id of no token. With M-RoPE genai takes what pads a batch out of positions and attention wherever it stands in a
#: prompt, which transformers does not: and the same token may end each message of a chat
_NO_TOKEN = -1


def genai_config(
    config: PretrainedConfig,
    generation: GenerationConfig,
    *,
    graphs: dict[str, str],
    head_size: int,
    kv_heads: int,
    vocab_size: int,
    provider: str,
    images: Images | None = None,
) -> dict[str, Any]:
    """The contents of genai_config.json.

    graphs: stage -> file name; of the decoder, one stage in the unified layout. images: of a model that takes them.
    """
    decoder = config if images is None else config.get_text_config(decoder=True)
    layers = decoder.num_hidden_layers
    bos, eos, pad = (_token(kind, generation, config, decoder) for kind in ("bos", "eos", "pad"))
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = next((token for token in (pad, first_eos) if token is not None), 0)
    if images is not None and images.axes:
        pad = _NO_TOKEN
    one_graph = images is not None or "decode" not in graphs
    family = config.model_type if config.model_type in _TYPES else "llama"
    inputs = TEXT_INPUTS if images is None else token_names(images.axes)
    return {
        "model": {
            "type": family if one_graph else "decoder-pipeline",
            **({"bos_token_id": bos} if bos is not None else {}),
            **({"eos_token_id": eos} if eos is not None else {}),
            "pad_token_id": pad,
            "context_length": decoder.max_position_embeddings,
            "vocab_size": vocab_size,
            **({} if images is None else image_sections(config, images, graphs)),
            "decoder": {
                "head_size": head_size,
                "hidden_size": decoder.hidden_size if images is None else images.width,
                "num_attention_heads": decoder.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": kv_heads,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "enable_mem_pattern": False,  # of use where shapes come again, and every token has longer ones
                    "provider_options": PROVIDERS[provider].genai_options,
                },
                "inputs": {
                    **{name: name for name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                **({"filename": graphs["prefill"]} if one_graph else {"pipeline": _pipeline(graphs, layers)}),
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": decoder.max_position_embeddings,
            "past_present_share_buffer": True,
        },
    }


def _token(kind: str, *sources: GenerationConfig | PretrainedConfig) -> Any:
    """A special token's id, or several; None where no source has one: not every family's config has the field."""
    found = (getattr(source, f"{kind}_token_id", None) for source in sources)
    return next((token for token in found if token is not None), None)


def _pipeline(graphs: dict[str, str], layers: int) -> list[dict[str, Any]]:
    io = {"inputs": input_names(layers), "outputs": output_names(layers)}
    return [
        {
            stage: {
                "filename": graphs[stage],
                **io,
                "run_on_prompt": stage == "prefill",
                "run_on_token_gen": stage == "decode",
            }
            for stage in ("prefill", "decode")
        }
    ]
