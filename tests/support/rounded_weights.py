"""What quantized weights stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from popcompile.passes.quantize_linear import quantized_weight, weight_scales


def rounded(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """What MatMulNBits multiplies with: (value - 2^(bits - 1)) * scale, blocks along the input features."""
    packed, scales = quantized_weight(weight, bits, block_size), weight_scales(weight, bits, block_size)
    values = torch.stack((packed & 15, packed >> 4), -1).flatten(2) if bits == 4 else packed
    blocks = (values.float() - 2 ** (bits - 1)) * scales[:, :, None]
    return blocks.flatten(1)[:, : weight.shape[1]]
