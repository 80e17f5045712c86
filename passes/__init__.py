"""The compiler: passes over FX graphs, one file each.

`transformations` and `lowering` list them in order. See base.py for what a pass is, ops.py for the node vocabulary.
"""

from collections.abc import Iterable

from .annotate_layers import AnnotateLayers
from .base import Pass, PassManager, PassRecord, Program
from .cleanup import Cleanup
from .contract import ContractError
from .fold_parameters import FoldParameters
from .fuse_rms_norm import FuseRMSNorm
from .fuse_rotary_embedding import FuseRotaryEmbedding
from .insert_boundary_recompute import InsertBoundaryRecompute
from .insert_kv_projection import InsertKVProjection
from .lower_attention import LowerAttention
from .lower_linear import LowerLinear
from .lower_rms_norm import LowerRMSNorm
from .lower_rotary_embedding import LowerRotaryEmbedding
from .normalize import Normalize
from .prune_lm_head import PruneLMHead
from .prune_prefill import PrunePrefill
from .split_stages import SplitStages

__all__ = ["ContractError", "Pass", "PassManager", "PassRecord", "Program", "lowering", "transformations"]


def transformations(pruned: Iterable[int]) -> list[Pass]:
    """The passes that keep graphs runnable in PyTorch: canonical form, stage split, pruning."""
    layers = sorted(set(pruned))
    return [
        Normalize(),
        FuseRMSNorm(),
        FuseRotaryEmbedding(),
        AnnotateLayers(),
        SplitStages(),
        PrunePrefill(layers),
        InsertKVProjection(layers),
        InsertBoundaryRecompute(),
        PruneLMHead(),
        Cleanup(),
    ]


def lowering() -> list[Pass]:
    """The passes that bring both graphs to ONNX Runtime's operators."""
    return [
        LowerAttention(),
        LowerRotaryEmbedding(),
        LowerRMSNorm(),
        LowerLinear(),
        FoldParameters(),
        Cleanup(),
    ]
