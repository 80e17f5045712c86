"""What a release of a dependency breaks: each kind of conversion once, against transformers, on models of two layers.

`.ci/oldest` runs it with the oldest version of every dependency. A model that is not what its module computes fails
here by its numbers; a warning on stderr fails in conftest's tiny_package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cli, save_model
from peft import LoraConfig, get_peft_model
from tiny_gguf import save_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import popcompile
from popcompile.frontend.source import open_source

IDS = torch.tensor([[5, 9, 2, 11, 7, 3]])
#: name: transformers' type, what its config says, options of convert
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, {}),
    "window, int8": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "query_pre_attn_scalar": 8},
        {"layout": "unified", "dtype": "int8"},
    ),
}


def assert_same(package: Path, expected: PreTrainedModel, tolerance: float) -> None:
    """The prompt's last logits where the package has no other; pruning the last layer changes none."""
    model = popcompile.load(package)
    with torch.no_grad():
        logits = expected.float().eval()(IDS).logits
    scale = float(logits.abs().max())
    found = (
        model(IDS).logits if "decode" in model.manifest.graphs else model(IDS, prefill="pop", logits_to_keep=1).logits
    )
    assert float((found - logits[:, -found.shape[1] :]).abs().max()) < tolerance * scale
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]


def test_command_line(tiny_package: Path, tiny_checkpoint: Path, cli: Cli) -> None:
    assert_same(tiny_package, AutoModelForCausalLM.from_pretrained(tiny_checkpoint), 1e-4)
    for command in ("inspect", "verify"):
        status, out, err = cli.run(command, tiny_package)
        assert (status, err) == (0, "") and out, command
    status, out, err = cli.run("run", tiny_package, "--prompt", "the cat sat", "--max-new-tokens", 4)
    assert status == 0 and out.count("\n") == 1
    assert "time to first token" in err and err.count("\n") == 1


def test_generate(tiny_package: Path, tiny_checkpoint: Path) -> None:
    """A padded batch, a second turn, and a sentence that ends it."""
    model, reference = (
        popcompile.load(tiny_package, prefill="full"),
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_package, padding_side="left", pad_token="<unk>")
    inputs = tokenizer(["the cat sat w3", "the"], return_tensors="pt", padding=True)
    fields = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    few: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    first, expected = model.generate(**fields, **few), reference.generate(**fields, **few)
    assert torch.equal(first.sequences, expected.sequences)
    whole = torch.cat((first.sequences, torch.tensor([[7, 8], [9, 4]])), dim=1)
    fields["attention_mask"] = torch.cat((fields["attention_mask"], torch.ones(2, 7, dtype=torch.int64)), dim=1)
    second = model.generate(
        whole, attention_mask=fields["attention_mask"], past_key_values=first.past_key_values, **few
    )
    expected = reference.generate(whole, attention_mask=fields["attention_mask"], **few)
    assert torch.equal(second.sequences, expected.sequences)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    model_type, fields, options = MODELS[name]
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | fields))
    model.save_pretrained(tmp_path / "model")
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", **options)
    assert_same(tmp_path / "out", model, 0.05 if "dtype" in options else 1e-4)


def test_adapter(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path / "adapter")
    popcompile.convert(base, tmp_path / "out", layers="1", kv_projection="layer", adapter=tmp_path / "adapter")
    assert_same(tmp_path / "out", model.merge_and_unload(), 1e-4)


def test_gguf(tmp_path: Path) -> None:
    """Read through transformers and gguf; its heads are too small for kernels to run."""
    source = open_source(str(save_gguf(tmp_path / "tiny.gguf")))
    assert (source.kind, source.config.model_type) == ("gguf", "llama")
