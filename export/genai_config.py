"""genai_config.json: what onnxruntime-genai needs to load the package as it is.

The unified layout is a decoder of one graph. The split layout is a "decoder-pipeline": prefill.onnx runs on prompts,
decode.onnx on single tokens; prefill stands first, for genai reads the shape of the logits from the first stage. The
cache is one buffer, which the graphs write in place. Sliding windows need no entry: GroupQueryAttention applies them
inside the graphs.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from .io_names import input_names, output_names
from .providers import PROVIDERS

#: model types that are types of decoders in genai 0.18 as well. All take these graphs, so any other is a "llama"; phi3
#: too, for genai encodes its text again where that becomes too long for the short RoPE factors.
_TYPES = {
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "qwen2", "qwen3",
    "smollm3",
}  # fmt: skip


def genai_config(
    config: PretrainedConfig,
    generation: GenerationConfig,
    *,
    graphs: dict[str, str],
    head_size: int,
    kv_heads: int,
    vocab_size: int,
    provider: str,
) -> dict[str, Any]:
    """The contents of genai_config.json; graphs: stage -> file name, of one stage in the unified layout."""
    layers = config.num_hidden_layers
    bos, eos, pad = (_token(kind, generation, config) for kind in ("bos", "eos", "pad"))
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = next((token for token in (pad, first_eos) if token is not None), 0)
    unified = len(graphs) == 1
    family = config.model_type if config.model_type in _TYPES else "llama"
    return {
        "model": {
            "type": family if unified else "decoder-pipeline",
            **({"bos_token_id": bos} if bos is not None else {}),
            **({"eos_token_id": eos} if eos is not None else {}),
            "pad_token_id": pad,
            "context_length": config.max_position_embeddings,
            "vocab_size": vocab_size,
            "decoder": {
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": kv_heads,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "enable_mem_pattern": False,  # of use where shapes come again, and every token has longer ones
                    "provider_options": PROVIDERS[provider].genai_options,
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                **({"filename": graphs["prefill"]} if unified else {"pipeline": _pipeline(graphs, layers)}),
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": True,
        },
    }


def _token(kind: str, generation: GenerationConfig, config: PretrainedConfig) -> Any:
    """A special token's id, or several; None where neither has one: not every family's config has the field."""
    found = (getattr(source, f"{kind}_token_id", None) for source in (generation, config))
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
