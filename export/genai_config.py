"""genai_config.json: what onnxruntime-genai needs to load the package as it is.

The unified layout is a decoder of one graph. The split layout is a "decoder-pipeline": prefill.onnx runs on prompts,
decode.onnx on single tokens; prefill stands first, for genai reads the shape of the logits from the first stage. The
cache is one buffer, which the graphs write in place. Sliding windows need no entry: GroupQueryAttention applies them
inside the graphs.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from .onnx_graph import input_names, output_names
from .providers import PROVIDERS

#: model_type of a checkpoint -> type of a decoder in genai 0.18, where they are not the same. All its decoders take
#: these graphs; but its phi3 encodes a text again where that becomes too long for the short RoPE factors.
_TYPES = {
    "gemma3": "gemma3_text", "gpt_neox": "llama", "mixtral": "mistral", "olmo2": "olmo", "phi3": "llama",
    "qwen2_moe": "qwen2", "qwen3_moe": "qwen3",
}  # fmt: skip
_KNOWN = {
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
    eos = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = next((t for t in (generation.pad_token_id, config.pad_token_id, first_eos) if t is not None), 0)
    unified = len(graphs) == 1
    return {
        "model": {
            "type": _family(config.model_type) if unified else "decoder-pipeline",
            **({"bos_token_id": config.bos_token_id} if config.bos_token_id is not None else {}),
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


def _family(model_type: str) -> str:
    known = _TYPES.get(model_type, model_type)
    return known if known in _KNOWN else "llama"


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
