"""Canonical programs of tiny models of four layers, and transformers' modules of the same weights."""

from __future__ import annotations

from functools import cache

from conftest import tiny_gemma3, tiny_llama, tiny_model, tiny_moe
from transformers import PreTrainedModel

from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, canonicalization

LAYERS = 4
KINDS = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=LAYERS),
    "gemma3": tiny_gemma3(num_hidden_layers=LAYERS, layer_types=KINDS),
    "qwen3_moe": tiny_moe(num_hidden_layers=LAYERS),
}


@cache
def canonical(family: str) -> tuple[PreTrainedModel, Program]:
    program = trace(CONFIGS[family])
    PassManager(canonicalization()).run(program)
    return tiny_model(CONFIGS[family]), program
