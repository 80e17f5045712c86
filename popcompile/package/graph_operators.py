"""The operators that a package's graphs may have, as data: their attributes, and how large these may be.

It is what the passes and the export emit (passes/, export/), and what torch.onnx writes for operators without a rule
(export/foreign.py). ONNX Runtime takes many attributes as they come: a number of heads of 2**40 divides by zero, a
negative block size reads outside of the weights. A graph with another operator, another attribute, or one out of range
is not opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Ints:
    """An integer, or a list of at most eight, each from `least` to `most`."""

    least: int
    most: int


@dataclass(frozen=True)
class Floats:
    """A finite number."""


@dataclass(frozen=True)
class Words:
    """One of some words."""

    choices: tuple[str, ...]


@dataclass(frozen=True)
class Subgraph:
    """A graph whose nodes are checked as well."""


@dataclass(frozen=True)
class Scalar:
    """A tensor of one number."""


Attribute: TypeAlias = Ints | Floats | Words | Subgraph | Scalar

_FLAG = Ints(0, 1)
_AXIS = Ints(-4, 3)  # of tensors of at most four dimensions
_AXES = Ints(-5, 4)
_SIZE = Ints(1, 1 << 27)
_TYPE = Ints(1, 16)  # of TensorProto
_BITS, _BLOCK = Ints(2, 8), Ints(16, 256)
_SIDES = Ints(1, 1 << 12)  # of patches, in pixels, and of what is pooled
_EPSILON = {"epsilon": Floats()}
_AXIS_ONLY: dict[str, Attribute] = {"axis": _AXIS}
_REDUCE: dict[str, Attribute] = {"axes": _AXES, "keepdims": _FLAG, "noop_with_empty_axes": _FLAG}
_NORM: dict[str, Attribute] = {"axis": _AXIS, "stash_type": Ints(1, 1), **_EPSILON}
_EXPERTS: dict[str, Attribute] = {
    "k": Ints(1, 1024),
    "activation_type": Words(("swiglu", "silu", "gelu", "relu", "identity")),
    "activation_alpha": Floats(),
    "activation_beta": Floats(),
    "swiglu_limit": Floats(),
    "swiglu_fusion": Ints(0, 2),
    "normalize_routing_weights": _FLAG,
    "use_sparse_mixer": _FLAG,
}
_PLAIN = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh Ceil Clip Cos Cosh Div Equal Erf Exp Expand Floor Greater"
    " GreaterOrEqual HardSwish Identity IsNaN Less LessOrEqual Log MatMul Max Mean Min Mish Mul Neg Not Or Pow Range"
    " Reciprocal Relu Round Sigmoid Sign Sin Sinh Size Slice Softplus Softsign Sqrt Squeeze Sub Sum Tan Tanh Unsqueeze"
    " Where Xor"
)

#: of the standard domain
STANDARD: dict[str, dict[str, Attribute]] = {
    **{name: {} for name in _PLAIN.split()},
    "ArgMax": {"axis": _AXIS, "keepdims": _FLAG, "select_last_index": _FLAG},
    "AveragePool": {"kernel_shape": _SIDES, "strides": _SIDES},
    "Cast": {"to": _TYPE, "saturate": _FLAG},
    "CastLike": {"saturate": _FLAG},
    "Celu": {"alpha": Floats()},
    "Concat": _AXIS_ONLY,
    "ConstantOfShape": {"value": Scalar()},
    "Conv": {"strides": _SIDES, "dilations": _SIDES, "group": Ints(1, 1)},
    "CumSum": {"exclusive": _FLAG, "reverse": _FLAG},
    "Elu": {"alpha": Floats()},
    "Flatten": {"axis": _AXES},
    "Gather": _AXIS_ONLY,
    "GatherElements": _AXIS_ONLY,
    "GatherND": {"batch_dims": _FLAG},
    "Gelu": {"approximate": Words(("none", "tanh"))},
    "Gemm": {"alpha": Floats(), "beta": Floats(), "transA": _FLAG, "transB": _FLAG},
    "HardSigmoid": {"alpha": Floats(), "beta": Floats()},
    "If": {"then_branch": Subgraph(), "else_branch": Subgraph()},
    "LayerNormalization": _NORM,
    "IsInf": {"detect_negative": _FLAG, "detect_positive": _FLAG},
    "LeakyRelu": {"alpha": Floats()},
    "LogSoftmax": _AXIS_ONLY,
    "Loop": {"body": Subgraph()},
    "LpNormalization": {"axis": _AXIS, "p": Ints(1, 2)},
    "Mod": {"fmod": _FLAG},
    "NonZero": {},
    "Pad": {"mode": Words(("constant",))},
    "QuantizeLinear": {"axis": _AXIS, "saturate": _FLAG},
    "ReduceL1": _REDUCE,
    "ReduceL2": _REDUCE,
    "ReduceLogSumExp": _REDUCE,
    "ReduceMax": _REDUCE,
    "ReduceMean": _REDUCE,
    "ReduceMin": _REDUCE,
    "ReduceProd": _REDUCE,
    "ReduceSum": _REDUCE,
    "ReduceSumSquare": _REDUCE,
    "Reshape": {"allowzero": _FLAG},
    "Scan": {"body": Subgraph(), "num_scan_inputs": Ints(1, 8)},
    "ScatterElements": {"axis": _AXIS, "reduction": Words(("none", "add", "mul", "max", "min"))},
    "ScatterND": {"reduction": Words(("none",))},
    "Selu": {"alpha": Floats(), "gamma": Floats()},
    "Shape": {"start": _AXES, "end": Ints(-4, 5)},
    "SimplifiedLayerNormalization": _NORM,
    "Softmax": _AXIS_ONLY,
    "Split": {"axis": _AXIS, "num_outputs": Ints(1, 16)},
    "TopK": {"axis": _AXIS, "largest": _FLAG, "sorted": _FLAG},
    "Transpose": {"perm": Ints(0, 4)},
    "Trilu": {"upper": _FLAG},
}

#: of com.microsoft
CONTRIB: dict[str, dict[str, Attribute]] = {
    "FusedMatMul": {
        "alpha": Floats(), "transA": _FLAG, "transB": _FLAG, "transBatchA": Ints(0, 0), "transBatchB": Ints(0, 0),
    },
    "GatherBlockQuantized": {"bits": _BITS, "block_size": _BLOCK, "gather_axis": Ints(0, 0), "quantize_axis": _AXIS},
    "GroupQueryAttention": {
        "num_heads": Ints(1, 4096),
        "kv_num_heads": Ints(1, 4096),
        "scale": Floats(),
        "softcap": Floats(),
        "do_rotary": _FLAG,
        "rotary_interleaved": _FLAG,
        "local_window_size": Ints(-1, (1 << 31) - 1),
        "smooth_softmax": _FLAG,
    },
    "MatMulIntegerToFloat": {},
    "MatMulNBits": {
        "K": _SIZE, "N": _SIZE, "bits": _BITS, "block_size": _BLOCK, "accuracy_level": Ints(0, 4),
    },
    "MoE": _EXPERTS,
    "MultiHeadAttention": {"num_heads": Ints(1, 4096), "scale": Floats()},
    "QMoE": {"expert_weight_bits": _BITS, "block_size": _BLOCK, **_EXPERTS},
    "QuickGelu": {"alpha": Floats()},
    "RotaryEmbedding": {
        "num_heads": Ints(0, 4096), "rotary_embedding_dim": Ints(0, 4096), "interleaved": _FLAG,
        "is_packed_batching": Ints(0, 0), "scale": Floats(),
    },
    "SkipSimplifiedLayerNormalization": dict(_EPSILON),
}  # fmt: skip

OPERATORS = {"": STANDARD, "com.microsoft": CONTRIB}
