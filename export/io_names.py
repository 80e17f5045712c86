"""Names of the graphs' inputs and outputs: those of onnxruntime-genai and optimum."""

from __future__ import annotations


def input_names(num_layers: int) -> list[str]:
    cache = [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]
    return ["input_ids", "attention_mask", *cache]


def output_names(num_layers: int) -> list[str]:
    return ["logits", *(f"present.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value"))]
