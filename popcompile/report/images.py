"""What images take of a prompt's FLOPs: the vision tower, which is not pruned, beside the decoder, which is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from popcompile.report.words import share


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs of a prompt of `tokens` tokens, of which one image has `image_tokens`.

    vision: of the tower. full, pop: of the decoder's prefill, with one row of logits, through all layers and pruned.
    """

    tokens: int
    image_tokens: int
    vision: int
    full: int
    pop: int

    @classmethod
    def of(cls, flops: Mapping[str, Any]) -> ImageFlops | None:
        """flops: those of a report. None for a model of text alone."""
        if "vision" not in flops:
            return None
        return cls(
            tokens=flops["reference_sizes"]["prefill"]["sequence"],
            image_tokens=flops["vision"]["image_tokens"],
            vision=flops["vision"]["flops"],
            full=flops["full_prefill_one_logit"],
            pop=flops["pop_prefill"],
        )

    @property
    def speedup(self) -> float:
        """How many times fewer FLOPs the pruned prompt takes, tower and decoder together."""
        return (self.vision + self.full) / (self.vision + self.pop)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers, and a row for the tower, for the decoder, and for both."""
        image, whole = f"vision, an image of {self.image_tokens:,} tokens", f"decoder, {self.tokens:,} tokens with it"
        parts = [(image, self.vision, self.vision), (whole, self.full, self.pop)]
        parts.append(("both", self.vision + self.full, self.vision + self.pop))
        rows = [
            [name, _giga(full), share(full / parts[-1][1]), _giga(pop), share(pop / parts[-1][2])]
            for name, full, pop in parts
        ]
        return ["", "full model, GFLOPs", "of both", "pruned, GFLOPs", "of both"], rows

    def words(self) -> str:
        """In one line, of the prompt as it is pruned and of the full model's."""
        pruned, full = (share(self.vision / (self.vision + decoder)) for decoder in (self.pop, self.full))
        return (
            f"{_giga(self.vision)} G for an image of {self.image_tokens:,} tokens, none of it pruned: {pruned} of a"
            f" prompt of {self.tokens:,} tokens with this image, {full} of the full model's; both together"
            f" {self.speedup:.2f}x fewer"
        )


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.1f}"
