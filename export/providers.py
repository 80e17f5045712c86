"""What differs between execution providers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ProviderChoices:
    """genai_options: provider_options of a session in genai_config.json.

    query_block: queries that the attention of a long prompt takes at a time (cached_attention.py); None: all.
    quantized_activations: what is multiplied with quantized weights; accuracy_level: MatMulNBits' attribute, 4 lets it
    multiply in int8, which the CPU's kernels are made for.
    """

    genai_options: list[dict[str, Any]] = field(default_factory=list)
    query_block: int | None = None
    quantized_activations: str = "fp16"
    accuracy_level: int = 0


PROVIDERS = {
    "cpu": ProviderChoices(query_block=128, quantized_activations="fp32", accuracy_level=4),
    "cuda": ProviderChoices(genai_options=[{"cuda": {}}]),
}
