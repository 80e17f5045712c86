"""What tracing cannot compile is refused in one line that names it; what it can, is not taken for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoConfig, PreTrainedConfig

from popcompile.errors import PopcompileError
from popcompile.frontend.tracing import trace
from popcompile.passes import ops
from popcompile.passes.graph import find, shape_of

_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

#: model type, fields of its config, what is said of it
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ALiBi": ("bloom", _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
    "ALiBi, where the config says so": (
        "falcon",
        _TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "ALiBi",
    ),
    "dynamic RoPE": (
        "llama",
        _SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "its RoPE has the type 'dynamic'; popcompile supports default, linear, llama3, longrope, proportional, yarn",
    ),
    "multi-head latent attention": ("minicpm3", _SIZES | _MLA, r"multi-head latent attention \(MLA\)"),
    "head sizes of their own": (
        "gemma4_text",
        _SIZES | {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "layer 1 caches . heads of 16 features, layer 0 2 of 8",
    ),
    "complex numbers": (
        "llama4_text",
        _SIZES | {"num_hidden_layers": 1, "head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention"]},
        "complex numbers",
    ),
    "positions from the padding token's on": (
        "camembert",
        _TOKENS
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "is_decoder": True,
        },
        "positions begin behind the padding token's id",
    ),
    "its own attention": (
        "gpt_neo",
        _TOKENS | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "its attention does not go through AttentionInterface",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever transformers or torch.export say of it stays with us."""
    kind, fields, said = REFUSED[case]
    config = AutoConfig.for_model(kind, **fields)
    capfd.readouterr()
    with pytest.raises(PopcompileError, match=said) as refused:
        trace(config)
    message = str(refused.value)
    assert message.startswith(kind) and "\n" not in message and len(message) < 400
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("length", [None, 0, True, "32", 32.0])
def test_a_context_length_is_asked_for(length: object) -> None:
    config = tiny_llama()
    object.__setattr__(config, "max_position_embeddings", length)
    with pytest.raises(PopcompileError, match="max_position_embeddings"):
        trace(config)


def test_the_cache_has_the_heads_that_the_model_makes() -> None:
    """Whatever the config calls them: with one head for all queries."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config: PreTrainedConfig = AutoConfig.for_model("gpt_bigcode", **_TOKENS | sizes, multi_query=True)
    graph = trace(config).graphs["model"]
    assert {shape_of(n)[1::2] for n in find(graph, op=ops.append_kv)} == {(1, 8)}


def test_attention_is_contiguous_for_the_module() -> None:
    """Modules go on with [B, S, H, D] and may take a view of it."""
    query, cache = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    positions = torch.arange(5).expand(2, 5)
    for out in (
        ops.attention(query, cache, cache, positions, 1.0, 0, 0.0),
        ops.attention(*(t.to("meta") for t in (query, cache, cache, positions)), 1.0, 0, 0.0),
    ):
        assert out.shape == (2, 4, 5, 8) and out.transpose(1, 2).is_contiguous()
