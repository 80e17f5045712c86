"""The compiler: passes over FX graphs, one file each.

pipeline.py lists them in order, base.py says what a pass is, ops.py is the node vocabulary, README.md how it works.
"""

from .base import Pass, PassManager, PassRecord, Program
from .contract import ContractError
from .insert_virtual_gates import InsertVirtualGates
from .lower_experts import ExpertKernels
from .pad_heads import AttentionKernels
from .pipeline import IMAGE_GRAPHS, canonicalization, image_lowering, lowering, pruning, transformations
from .quantize_linear import Quantization

__all__ = [
    "IMAGE_GRAPHS",
    "AttentionKernels",
    "ContractError",
    "ExpertKernels",
    "InsertVirtualGates",
    "Pass",
    "PassManager",
    "PassRecord",
    "Program",
    "Quantization",
    "canonicalization",
    "image_lowering",
    "lowering",
    "pruning",
    "transformations",
]
