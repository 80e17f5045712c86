"""Names of the graphs' inputs and outputs: those of onnxruntime-genai and optimum."""

from __future__ import annotations

from collections.abc import Sequence

#: of the graphs around a decoder whose inputs are embeddings; their inputs have the names of the traced ones
IMAGE_OUTPUTS = {"vision": ["image_features"], "embedding": ["inputs_embeds"], "text_embedding": ["inputs_embeds"]}


#: a decoder's inputs before the cache, of text alone
TEXT_INPUTS = ("input_ids", "attention_mask")


def token_names(axes: int) -> list[str]:
    """A decoder's inputs before the cache, of text and images. axes: of position_ids; 0 where it has none."""
    return ["inputs_embeds", "attention_mask", *(["position_ids"] if axes else [])]


def input_names(num_layers: int, tokens: Sequence[str] = TEXT_INPUTS) -> list[str]:
    """tokens: the inputs before the cache, as Program.inputs has them."""
    cache = [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]
    return [*tokens, *cache]


def output_names(num_layers: int) -> list[str]:
    return ["logits", *(f"present.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value"))]
