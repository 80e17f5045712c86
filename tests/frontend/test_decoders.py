"""Architectures: which are decoders, how others are refused, and code in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bad_input import refusal_to_open

from popcompile.frontend.source import open_source

REFUSED = {
    "t5": "T5ForX (model type t5) is an encoder-decoder",
    "whisper": "is an encoder-decoder",
    "vit": "has no causal language model",
    "clip": "has no causal language model",
    "bert": "is an encoder (config.is_decoder is false)",
    "mamba": "is a state-space model",
    "falcon_mamba": "is a state-space model",
    "rwkv": "is a recurrent model",
    "jamba": "is a state-space hybrid",
    "recurrent_gemma": "is a hybrid of recurrence and attention",
    "lfm2": "is a hybrid of convolution and attention",
    "qwen3_next": "has layers of type linear_attention",
    "qwen2_5_vl": "and of others the text decoder alone, here of model type qwen2_5_vl_text: add --text-only",
    "llava": "takes more than text",
    "no_such_type": "does not know model type no_such_type",
}

ACCEPTED = [
    "gemma3",
    "qwen3_vl",
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "qwen3_moe",
    "mixtral",
]


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_architecture(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "architectures": [f"{model_type.title()}ForX"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal_to_open(tmp_path, random_weights=True)
    assert REFUSED[model_type] in message
    assert "popcompile supports" in message or "popcompile compiles" in message


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_accepted_architecture(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert open_source(str(tmp_path), random_weights=True).config.model_type == model_type


def test_remote_code_runs_only_on_request(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    assert "model type own is code in the checkpoint; to run it: --trust-remote-code" in refusal_to_open(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert open_source(str(tmp_path), random_weights=True, trust_remote_code=True).config.model_type == "own"
    assert (tmp_path / "ran").exists()
