"""What differs between execution providers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ProviderChoices:
    """genai_options: provider_options of a session in genai_config.json.

    query_block: queries that the attention of a long prompt takes at a time (block_attention.py); None: all.
    """

    genai_options: list[dict[str, Any]] = field(default_factory=list)
    query_block: int | None = None


PROVIDERS = {
    "cpu": ProviderChoices(query_block=128),
    "cuda": ProviderChoices(genai_options=[{"cuda": {}}]),
}
