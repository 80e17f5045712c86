"""What --dtype means: the type of activations and cache, and how weights are stored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS
from popcompile.passes import AttentionKernels, ExpertKernels, Pass, Quantization, lowering

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: of weights; w8a8 multiplies with activations in int8 too
_BITS = {"int8": 8, "int4": 4, "w8a8": 8}
PRECISIONS = (*_FLOATS, *_BITS)

#: input features that share a scale: less error, or fewer scales
BLOCK_SIZES = (16, 32, 64, 128, 256)
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Precision:
    """dtype: of activations, cache, and weights that are not quantized. quantization: of linear layers and experts.

    experts: the provider's kernels, which may keep experts in another dtype, or from being quantized. attention: the
    provider's kernels, which may ask for wider heads.
    """

    dtype: torch.dtype
    quantization: Quantization | None = None
    experts: ExpertKernels = field(default_factory=ExpertKernels)
    attention: AttentionKernels = field(default_factory=AttentionKernels)

    def lowering(self) -> list[Pass]:
        """The passes that bring a program's graphs to the provider's operators."""
        return lowering(self.quantization, self.experts, self.attention)

    def bytes(self, parameters: int) -> int:
        """At least so many for a model of that many parameters."""
        bits = self.quantization.bits if self.quantization else 8 * self.dtype.itemsize
        return parameters * bits // 8


def precision(name: str, provider: str, block_size: int) -> Precision:
    """name: one of PRECISIONS. provider: a name in PROVIDERS. Raises PopcompileError for a block size out of range,
    and for a type that the provider has no kernels for.
    """
    choices = PROVIDERS[provider]
    if name in _FLOATS and name not in choices.dtypes:
        raise PopcompileError(
            f"--dtype {name}: ONNX Runtime's attention has no kernels for it on {provider}; choose"
            f" {' or '.join(choices.dtypes)}"
        )
    experts, attention = ExpertKernels(**choices.experts), AttentionKernels(**choices.attention)
    if name in _FLOATS:
        return Precision(_FLOATS[name], experts=experts, attention=attention)
    if name == "w8a8" and not choices.int8_products:
        able = " or ".join(other for other, provider_choices in PROVIDERS.items() if provider_choices.int8_products)
        raise PopcompileError(
            f"--dtype w8a8: ONNX Runtime has kernels for it on {able}, none on {provider}; choose int8"
        )
    if block_size not in BLOCK_SIZES:
        raise PopcompileError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    quantization = Quantization(_BITS[name], block_size, choices.accuracy_level, dynamic=name == "w8a8")
    return Precision(_FLOATS[choices.dtypes[0]], quantization, experts, attention)
