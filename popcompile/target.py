"""What graphs are lowered for: a precision (export/precisions.py) on a provider (export/providers.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from popcompile.errors import PopcompileError
from popcompile.export.precisions import PRECISIONS
from popcompile.export.providers import PROVIDERS, activations
from popcompile.passes import AttentionKernels, ExpertKernels, Pass, Quantization, image_lowering, lowering

#: input features that share a scale: less error, or fewer scales
BLOCK_SIZES = (16, 32, 64, 128, 256)
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Target:
    """precision, provider: names in PRECISIONS and PROVIDERS. dtype: of activations, cache, and weights that are not
    quantized. quantization: of linear layers and experts.

    experts: the provider's kernels, which may keep experts in another dtype, or from being quantized. attention: the
    provider's kernels, which may ask for wider heads.
    """

    precision: str
    provider: str
    dtype: torch.dtype
    quantization: Quantization | None = None
    experts: ExpertKernels = field(default_factory=ExpertKernels)
    attention: AttentionKernels = field(default_factory=AttentionKernels)

    @classmethod
    def of(cls, precision: str, provider: str, block_size: int) -> Target:
        """block_size: where weights are quantized.

        Raises PopcompileError for one out of range, and for a precision that the provider has no kernels for.
        """
        stored, kernels = PRECISIONS[precision], PROVIDERS[provider]
        experts, attention = ExpertKernels(**kernels.experts), AttentionKernels(**kernels.attention)
        dtype: torch.dtype = getattr(torch, activations(precision, provider))
        if not stored.quantized:
            if precision not in kernels.dtypes:
                raise PopcompileError(
                    f"--dtype {precision}: ONNX Runtime's attention has no kernels for it on {provider}; choose"
                    f" {' or '.join(kernels.dtypes)}"
                )
            return cls(precision, provider, dtype, experts=experts, attention=attention)
        if stored.quantizes_activations and not kernels.int8_products:
            able = " or ".join(other for other, its in PROVIDERS.items() if its.int8_products)
            raise PopcompileError(
                f"--dtype {precision}: ONNX Runtime has kernels for it on {able}, none on {provider}; choose int8"
            )
        if block_size not in BLOCK_SIZES:
            raise PopcompileError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
        quantization = Quantization(
            stored.bits, block_size, kernels.accuracy_level, dynamic=stored.quantizes_activations
        )
        return cls(precision, provider, dtype, quantization, experts, attention)

    @property
    def int8_activations(self) -> bool:
        """Whether linear layers round what they multiply with."""
        return self.quantization is not None and self.quantization.dynamic

    def lowering(self) -> list[Pass]:
        """The passes that bring a program's graphs to the provider's operators."""
        return lowering(self.quantization, self.experts, self.attention)

    def image_lowering(self) -> list[Pass]:
        """Those of the graphs around a decoder that takes embeddings, which run before."""
        return image_lowering(self.quantization)

    def weight_bytes(self, parameters: int) -> int:
        """At least so many for a model of that many parameters."""
        bits = self.quantization.bits if self.quantization else 8 * self.dtype.itemsize
        return parameters * bits // 8
