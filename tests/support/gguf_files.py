"""Writes GGUF files of tiny models as llama.cpp's converter does, from transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

_SIZES = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 48, "n_inner": 96}
_GEMMA = {
    "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
PATTERN = {"attention.sliding_window_pattern": [True, False, True]}

#: architecture -> transformers' model type, fields of its config that differ from the class's defaults, more metadata
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_theta": 5e5}, "attention_bias": True, "mlp_bias": True}, {}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6}}, {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, {}),
    "qwen2moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 48}, {}),
    "qwen3moe": ("qwen3_moe", _EXPERTS | {"head_dim": 32, "norm_topk_prob": True}, {"expert_gating_func": 1}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.75, "sliding_window": 16}, {}),
    "gemma2": ("gemma2", _GEMMA | {"final_logit_softcapping": 20.0, "attn_logit_softcapping": 40.0}, PATTERN),
    "gemma3": ("gemma3_text", _GEMMA, PATTERN),
    "starcoder2": ("starcoder2", {"rope_parameters": {"rope_theta": 1e6}, "norm_epsilon": 1e-3}, {}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "use_parallel_residual": True}, {}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.25, "norm_eps": 1e-3, "head_dim": 16}, {}),
    "gpt2": ("gpt2", _GPT2, {}),
}
#: Llama's models as most are, without biases
PLAIN = {"attention_bias": False, "mlp_bias": False}


def model_of(architecture: str, **changes: Any) -> PreTrainedModel:
    """transformers' module with random weights."""
    kind, fields, _ = MODELS[architecture]
    fields = (_SIZES if kind != "gpt2" else {"vocab_size": 48}) | fields | changes
    return tiny_model(AutoConfig.for_model(kind, **fields))


def metadata_of(architecture: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes, without the architecture's name."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "n_inner", None) or config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    epsilons = {"rms_norm_eps": "layer_norm_rms_epsilon"} | dict.fromkeys(
        ("layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon"), "layer_norm_epsilon"
    )
    keys |= {f"attention.{key}": getattr(config, name) for name, key in epsilons.items() if hasattr(config, name)}
    same = {
        "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "final_logit_softcapping": "final_logit_softcapping", "attn_logit_softcapping": "attn_logit_softcapping",
        "num_key_value_heads": "attention.head_count_kv",
    }  # fmt: skip
    keys |= {key: getattr(config, name) for name, key in same.items() if getattr(config, name, None) is not None}
    if architecture in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window
    if architecture != "gpt2":
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        keys |= {"attention.key_length": head, "attention.value_length": head, "rope.freq_base": rope["rope_theta"]}
        keys["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    return keys | MODELS[architecture][2]


def tensors_of(architecture: str, model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """Every parameter under llama.cpp's name and in its layout."""
    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    stored = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().numpy()
        if ".experts." in name:
            block = f"blk.{name.split('.')[2]}"
            parts = ["gate", "up"] if "gate_up" in name else ["down"]
            for part, values in zip(parts, np.split(tensor, len(parts), axis=1), strict=True):
                stored[f"{block}.ffn_{part}_exps.weight"] = np.ascontiguousarray(values)
            continue
        module, _, kind = name.rpartition(".")
        target = f"{names.get_name(module)}.{kind}"
        if architecture == "llama" and ("attn_q." in target or "attn_k." in target):
            tensor = permuted(tensor, config.num_attention_heads if "attn_q." in target else config.num_key_value_heads)
        if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "gpt2" and kind == "weight" and tensor.ndim == 2 and ".h." in name:
            tensor = tensor.T
        if "ffn_gate_inp_shexp" in target:
            tensor = tensor[0]
        stored[target] = np.ascontiguousarray(tensor)
    return stored


def permuted(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py: halves of a head to neighbouring rows."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", *"cat", "ca", *(f"w{i}" for i in range(38))]
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [1] * 48,
    "tokenizer.ggml.merges": ["c a", "ca t"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, NDArray]) -> Path:
    """metadata: whole keys. A value of None leaves the key out. tensors: floats, or blocks of Q8_0 in bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        blocks = gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, tensor, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_gguf(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray] | None = None,
    leave_out: Sequence[str] = (),
) -> Path:
    """A whole file of `model`, with other metadata (whole keys) and tensors."""
    keys = {f"{architecture}.{key}": value for key, value in metadata_of(architecture, model.config).items()}
    written = {k: v for k, v in (tensors_of(architecture, model) | dict(tensors or {})).items() if k not in leave_out}
    return write_gguf(path, architecture, keys | VOCABULARY | dict(metadata or {}), written)


@torch.no_grad()
def logits_of(model: PreTrainedModel, length: int = 40) -> torch.Tensor:
    ids = torch.randint(48, (1, length), generator=torch.Generator().manual_seed(1))
    return model(ids).logits[0]


# --- fixtures, which conftest.py registers ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def gguf_llama() -> PreTrainedModel:
    return model_of("llama", **PLAIN)


@pytest.fixture(scope="session")
def gguf_file(gguf_llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of gguf_llama, for tests that read it and leave it as it is."""
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", gguf_llama)
