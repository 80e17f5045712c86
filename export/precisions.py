"""What differs between precisions (--dtype), as data. Names of element types are those of PyTorch and of ONNX."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """A value of --dtype.

    bits: of a stored weight of a linear layer or expert.
    torch_dtype, onnx_type: of activations, cache, and weights that are not quantized ("float16" and "tensor(float16)");
        None where weights are quantized: then they are those of the provider's first dtype.
    quantizes_activations: whether linear layers multiply in integers, with a scale for every token.
    tolerance: largest difference between prefill and decode that rounding explains, relative to the largest value.
    """

    bits: int
    torch_dtype: str | None = None
    onnx_type: str | None = None
    quantizes_activations: bool = False
    tolerance: float = 5e-2

    @property
    def quantized(self) -> bool:
        """Whether weights are, in blocks that share a scale."""
        return self.torch_dtype is None


PRECISIONS = {
    "fp32": Precision(32, "float32", "tensor(float)", tolerance=1e-3),
    "fp16": Precision(16, "float16", "tensor(float16)", tolerance=2e-2),
    "bf16": Precision(16, "bfloat16", "tensor(bfloat16)"),
    "int8": Precision(8),
    "int4": Precision(4),
    "w8a8": Precision(8, quantizes_activations=True, tolerance=0.3),
}
#: of those in which activations may be
FLOATS = {name: precision for name, precision in PRECISIONS.items() if not precision.quantized}
