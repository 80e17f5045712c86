"""Random weights with which a wrong layer shows."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def randomize(model: Module, scale: float = 0.3) -> Module:
    """The module itself, its matrices drawn with that standard deviation, its norms and biases moved by up to 0.5.

    transformers' initialisation leaves layers that add about 1e-3 to the residual stream, where a wrong layer passes
    every tolerance; here a layer changes logits by more than 0.1. The caller seeds PyTorch.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            else:
                parameter.normal_(0, scale)
    return model
