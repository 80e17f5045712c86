"""The passes in order, in three phases: one form for every model, a prefill without pruned layers, and the operators of
ONNX Runtime. Whoever adds a pass adds it here.
"""

from collections.abc import Iterable

from .annotate_layers import AnnotateLayers
from .balance_activations import BalanceActivations
from .base import Pass
from .cleanup import Cleanup
from .fold_parameters import FoldParameters
from .fuse_rms_norm import FuseRMSNorm
from .fuse_rotary_embedding import FuseRotaryEmbedding
from .fuse_skip_rms_norm import FuseSkipRMSNorm
from .gather_rotary_rows import GatherRotaryRows
from .insert_boundary_recompute import InsertBoundaryRecompute
from .insert_bypass import InsertBypass
from .insert_kv_projection import InsertKVProjection
from .lower_attention import LowerAttention
from .lower_experts import ExpertKernels, LowerExperts
from .lower_linear import LowerLinear
from .lower_rms_norm import LowerRMSNorm
from .lower_rotary_embedding import LowerRotaryEmbedding
from .normalize import Normalize
from .pack_qkv import PackQKV
from .pad_heads import AttentionKernels, PadHeads
from .prune_lm_head import PruneLMHead
from .prune_prefill import PrunePrefill
from .quantize_dynamic import QuantizeDynamic
from .quantize_embedding import QuantizeEmbedding
from .quantize_linear import Quantization, QuantizeLinear
from .split_stages import SplitStages
from .widen_logits import WidenLogits


def canonicalization() -> list[Pass]:
    """The passes that bring a traced graph to the one form that all others read: fused patterns, layers and roles."""
    return [Normalize(), FuseRMSNorm(), FuseRotaryEmbedding(), AnnotateLayers()]


def pruning(
    pruned: Iterable[int], calibrated: Iterable[int] = (), bypassed: Iterable[int] = (), window: int = 1
) -> list[Pass]:
    """The passes that split a canonical graph into stages and prune prefill; graphs stay runnable in PyTorch.

    calibrated: pruned layers with a calibrated KV projection. bypassed: first layers of runs with a calibrated bypass.
    window: tokens at the end of a prompt that take the whole model.
    """
    layers = sorted(set(pruned))
    return [
        SplitStages(),
        PrunePrefill(layers),
        InsertKVProjection(layers, calibrated),
        InsertBoundaryRecompute(window),
        InsertBypass(layers, bypassed),
        PruneLMHead(),
        Cleanup(),
    ]


#: the graphs around a decoder whose inputs are embeddings: the vision tower, and the embedding of tokens and images
IMAGE_GRAPHS = ("vision", "embedding")


def image_lowering(quantization: Quantization | None = None) -> list[Pass]:
    """The passes that bring the graphs around a decoder, as they were traced, to ONNX Runtime's operators.

    They read the program's other graphs to see who shares a parameter, and are to run before those are lowered.
    quantization: of the decoder's weights, of which the embedding's may be one; the vision tower's are left.
    """
    passes: list[Pass] = [
        Normalize(),
        FuseRMSNorm(),
        LowerRMSNorm(),
        *([QuantizeEmbedding(quantization)] if quantization else []),
        LowerLinear(),
        FoldParameters(),
        Cleanup(),
    ]
    for one in passes:
        one.stages = IMAGE_GRAPHS
    return passes


def transformations(pruned: Iterable[int], window: int = 1) -> list[Pass]:
    """From a traced graph to two stages."""
    return [*canonicalization(), *pruning(pruned, window=window)]


def lowering(
    quantization: Quantization | None = None,
    experts: ExpertKernels | None = None,
    attention: AttentionKernels | None = None,
) -> list[Pass]:
    """The passes that bring both graphs to ONNX Runtime's operators.

    quantization: of the weights of linear layers and experts. experts, attention: the provider's kernels.
    """
    dynamic = quantization is not None and quantization.dynamic
    return [
        *([BalanceActivations()] if dynamic else []),
        PadHeads(attention),
        GatherRotaryRows(),
        LowerAttention(),
        PackQKV(),
        LowerRotaryEmbedding(),
        LowerRMSNorm(),
        FuseSkipRMSNorm(),
        *([QuantizeDynamic()] if dynamic else []),
        *([QuantizeEmbedding(quantization), QuantizeLinear(quantization)] if quantization else []),
        LowerLinear(),
        LowerExperts(experts or ExpertKernels(), quantization),
        FoldParameters(),
        WidenLogits(),
        Cleanup(),
    ]
