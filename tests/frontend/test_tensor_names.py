"""A checkpoint's tensors go where transformers puts them, each to one place; what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from bad_input import refusal
from conftest import tiny_llama, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GPT2Config, PreTrainedConfig

import popcompile
from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import Source, open_source
from popcompile.frontend.tensor_names import TensorNames, settle_ties
from popcompile.frontend.tracing import trace

EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj"

Tensors = Mapping[str, Tensor]


def checkpoint(folder: Path, config: PreTrainedConfig, change: Callable[[Tensors], Tensors] = dict) -> Source:
    """A tiny model whose tensors were changed."""
    tiny_model(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)
    return open_source(str(folder))


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def test_each_of_two_untied_tensors(tmp_path: Path) -> None:
    names = TensorNames(checkpoint(tmp_path, tiny_llama()))
    assert (names.of(EMBEDDING), names.of(HEAD)) == (EMBEDDING, HEAD)


def test_an_untied_model_does_not_take_the_head_for_its_embedding(tmp_path: Path) -> None:
    """Stored under another name, where popcompile would not look."""
    names = TensorNames(checkpoint(tmp_path, tiny_llama(), renamed(EMBEDDING, "model.tok_embeddings.weight")))
    assert f"the checkpoint has no tensor {EMBEDDING};" in refusal(lambda: names.of(EMBEDDING))


def test_tied_tensors_stand_under_either_name(tmp_path: Path) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    names = TensorNames(checkpoint(tmp_path, tied, renamed(EMBEDDING, HEAD)))
    assert names.of(EMBEDDING) == names.of(HEAD) == HEAD


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_base_models_prefix(prefix: str, tmp_path: Path) -> None:
    names = TensorNames(checkpoint(tmp_path, tiny_llama(), renamed("model.", prefix)))
    assert names.of(f"{Q}.weight") == prefix + f"{Q}.weight".removeprefix("model.")
    assert names.unused == []


def test_a_compiled_modules_prefix(tmp_path: Path) -> None:
    names = TensorNames(checkpoint(tmp_path, tiny_llama(), renamed("", "_orig_mod.")))
    assert names.of(f"{Q}.weight") == f"_orig_mod.{Q}.weight"
    assert names.unused == []


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_part_of_another_model(prefix: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, tiny_llama(), renamed("model." * prefix.startswith("model"), prefix))
    line = refusal(lambda: TensorNames(source).of(EMBEDDING))
    assert f"the checkpoint's tensors stand under {prefix}, as a part of another model: add --text-only" in line


def test_what_is_left_over(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, tiny_llama(), added(f"{Q}.bias", 64))
    line = refusal(lambda: Checkpoint(source, trace(source.config), torch.float32))
    assert f"the checkpoint has tensors that a llama of its config does not have: {Q}.bias; config and" in line


IGNORED: dict[str, tuple[PreTrainedConfig, Callable[[Tensors], Tensors]]] = {
    "frequencies of RoPE": (tiny_llama(), added("model.layers.0.self_attn.rotary_emb.inv_freq", 8)),
    "GPT-2's masks": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32),
        added("h.0.attn.bias", 1, 1, 32, 32),
    ),
    "layers for further tokens": (
        Glm4MoeConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            head_dim=16, n_routed_experts=4, moe_intermediate_size=16, intermediate_size=32, num_nextn_predict_layers=1,
        ),
        added("model.layers.1.eh_proj.weight", 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IGNORED)
def test_what_transformers_ignores(kind: str, tmp_path: Path) -> None:
    config, change = IGNORED[kind]
    assert TensorNames(checkpoint(tmp_path, config, change)).unused == []


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, tiny_llama(), added("norm.weight", 32))
    assert "model.norm.weight and norm.weight are both model.norm.weight" in refusal(lambda: TensorNames(source))


@pytest.mark.parametrize("same", [True, False])
def test_tied_in_the_config_alone(same: bool, tmp_path: Path) -> None:
    """A head of its own in the checkpoint, as fine-tuning may leave it: transformers ties equal tensors only."""
    tied = tiny_llama(tie_word_embeddings=True)
    head = lambda t: {**t, HEAD: t[EMBEDDING].clone() if same else t[EMBEDDING] + 1}  # noqa: E731
    source = checkpoint(tmp_path / "model", tied, head)
    settle_ties(source)
    assert source.config.tie_word_embeddings is same
    if same:
        return
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", layout="unified")
    ids = torch.arange(3, 4)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
    model = popcompile.load(tmp_path / "out")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert model.config.tie_word_embeddings is False
