"""What differs between execution providers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .precisions import PRECISIONS


@dataclass(frozen=True)
class Provider:
    """name: ONNX Runtime's. package: what pip installs it with. device: where weights and cache live, in ONNX Runtime's
    words.

    gpu: whether it needs an NVIDIA GPU, whose memory is then counted apart. libraries: parts of ONNX Runtime to load
    before its first session, because it only logs that one of them is missing and goes on without the provider.

    dtypes: of activations, those that GroupQueryAttention has kernels for; the first one is the default, and what is
    multiplied with quantized weights. genai_options: provider_options of a session in genai_config.json.
    query_block: queries that the attention of a long prompt takes at a time, at least (attention_blocks.py); None: all.
    key_multiple: what divides the number of keys that MultiHeadAttention takes with a bias (image_attention.py).
    accuracy_level: MatMulNBits' attribute, 4 lets it multiply in int8, which the CPU's kernels are made for.
    int8_products: whether there are kernels for w8a8 (passes/quantize_dynamic.py).
    fp16_products: whether MatMul has a kernel for fp16 (widen_products.py).
    experts: arguments of ExpertKernels (passes/lower_experts.py). attention: of AttentionKernels (passes/pad_heads.py).
    """

    name: str
    package: str
    device: str
    dtypes: tuple[str, ...]
    gpu: bool = False
    libraries: tuple[str, ...] = ()
    genai_options: list[dict[str, Any]] = field(default_factory=list)
    query_block: int | None = None
    key_multiple: int = 1
    accuracy_level: int = 0
    int8_products: bool = False
    fp16_products: bool = True
    experts: dict[str, bool] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=lambda: {"head_multiple": 8})

    @property
    def on_host(self) -> bool:
        """Whether weights and cache lie in the host's memory, where NumPy and PyTorch read and write them in place."""
        return self.device == "cpu"


PROVIDERS = {
    "cpu": Provider(
        "CPUExecutionProvider",
        "onnxruntime",
        "cpu",
        ("fp32", "fp16"),
        query_block=128,
        accuracy_level=4,
        int8_products=True,
        fp16_products=False,
        # MoE before ONNX Runtime 1.32 returns zeros where its memory is its input's
        experts={"fp32_only": True, "quantized": True, "overwrites_input": True},
    ),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "onnxruntime-gpu",
        "cuda",
        ("fp16", "bf16"),
        gpu=True,
        libraries=("shared", "cuda"),
        genai_options=[{"cuda": {}}],
        # of CUTLASS' attention: "attn_bias is not correctly aligned"
        key_multiple=8,
        # flash attention's; what falls back from it is not tested
        attention={"head_multiple": 8, "max_head_size": 256},
    ),
}


def activations(precision: str, provider: str) -> str:
    """PyTorch's name of the type of activations, cache, and weights that are not quantized. Names in PRECISIONS and
    PROVIDERS.
    """
    dtype = PRECISIONS[precision].torch_dtype or PRECISIONS[PROVIDERS[provider].dtypes[0]].torch_dtype
    assert dtype is not None  # a provider's are floats
    return dtype
