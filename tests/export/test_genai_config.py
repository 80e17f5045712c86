"""genai_config.json of families whose configs lack a field; what genai does with it is in test_genai.py."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CodeGenConfig, GenerationConfig, LlamaConfig, PretrainedConfig

from popcompile.export.genai_config import genai_config


@pytest.mark.parametrize(
    ("config", "generation", "tokens"),
    [
        (CodeGenConfig(), {}, {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}),
        (LlamaConfig(pad_token_id=7), {}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 7}),
        (LlamaConfig(), {"eos_token_id": [5, 6]}, {"bos_token_id": 1, "eos_token_id": [5, 6], "pad_token_id": 5}),
        (LlamaConfig(bos_token_id=None, eos_token_id=None), {}, {"pad_token_id": 0}),
    ],
    ids=["no pad_token_id in the config", "the config's", "generation's", "none"],
)
def test_special_tokens(config: PretrainedConfig, generation: dict[str, Any], tokens: dict[str, Any]) -> None:
    sizes = {"head_size": 8, "kv_heads": 2, "vocab_size": 64}
    graphs = {"prefill": "model.onnx"}
    model = genai_config(config, GenerationConfig(**generation), graphs=graphs, provider="cpu", **sizes)["model"]
    assert {name: value for name, value in model.items() if name.endswith("token_id")} == tokens
