"""Names of the graphs' inputs and outputs: those of onnxruntime-genai and optimum."""

from __future__ import annotations

from collections.abc import Sequence

#: of the graphs around a decoder whose inputs are embeddings; their inputs have the names of the traced ones
IMAGE_OUTPUTS = {"vision": ["image_features"], "embedding": ["inputs_embeds"]}


def input_names(num_layers: int, tokens: Sequence[str] = ("input_ids", "attention_mask")) -> list[str]:
    """tokens: the inputs before the cache, as Program.inputs has them."""
    cache = [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]
    return [*tokens, *cache]


def output_names(num_layers: int) -> list[str]:
    return ["logits", *(f"present.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value"))]
