"""genai_config.json: what onnxruntime-genai needs to load the package as it is.

The split layout is its "decoder-pipeline": prefill.onnx runs on prompts, decode.onnx on single tokens. Prefill stands
first in the pipeline, for genai reads the shape of the logits from the first stage. The cache is one buffer, which both
graphs write in place. Sliding windows need no entry: GroupQueryAttention applies them inside the graphs.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from .onnx_graph import input_names, output_names
from .providers import PROVIDERS


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
    """The contents of genai_config.json for the split layout; graphs: stage -> file name."""
    layers = config.num_hidden_layers
    eos = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = next((t for t in (generation.pad_token_id, config.pad_token_id, first_eos) if t is not None), 0)
    io = {"inputs": input_names(layers), "outputs": output_names(layers)}
    return {
        "model": {
            "type": "decoder-pipeline",
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
                "pipeline": [
                    {
                        stage: {
                            "filename": graphs[stage],
                            **io,
                            "run_on_prompt": stage == "prefill",
                            "run_on_token_gen": stage == "decode",
                        }
                        for stage in ("prefill", "decode")
                    }
                ],
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": True,
        },
    }
