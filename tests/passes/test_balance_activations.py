"""BalanceActivations computes the same, and lets activations round less where some features are larger than others."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
from calibrated import Traced
from conftest import make_inputs, materialise, run_graph, tiny_gemma3, tiny_llama, tiny_moe
from torch import Tensor
from transformers import Olmo2Config, Phi3Config, PreTrainedConfig, PreTrainedModel
from words import save_tiny, save_words

import popcompile
from popcompile.passes import PassManager, Program, pruning
from popcompile.passes.balance_activations import BalanceActivations, balanceable
from popcompile.passes.graph import shape_of
from popcompile.pruning import plan
from popcompile.pruning.input_factors import input_factors
from popcompile.pruning.rows import Rows
from popcompile.runtime.verify import verify
from popcompile.variants import Variants

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: by family: a config, and what is balanced of three layers
CONFIGS: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama": (tiny_llama(num_hidden_layers=3), 6),
    "llama with biases": (tiny_llama(num_hidden_layers=3, mlp_bias=True), 6),
    "gemma3": (tiny_gemma3(num_hidden_layers=3), 6),  # norms of 1 + weight
    "phi3": (Phi3Config(**SIZES), 6),  # gate and up are one projection
    "phi3, up first": (Phi3Config(**SIZES), 6),
    "olmo2": (Olmo2Config(**SIZES), 3),  # no norm before the feed-forward block
    "experts": (tiny_moe(), 0),  # a router reads the norm too, and experts are no linear layers
}


def random_factors(program: Program) -> dict[str, Tensor]:
    """Powers of two, which change no digit."""
    random = torch.Generator().manual_seed(0)
    return {
        each.constant: torch.exp2(torch.randint(-3, 4, (shape_of(each.features)[-1],), generator=random))
        for each in balanceable(program.graphs["model"])
    }


def with_up_first(program: Program) -> Program:
    """The other half of what is one projection goes through the activation."""
    for gm in program.graphs.values():
        for node in gm.graph.nodes:
            if node.target is operator.getitem and node.args[0].target == torch.ops.aten.chunk.default:
                node.args = node.args[0], 1 - node.args[1]
        gm.recompile()
    return program


@pytest.mark.parametrize("family", CONFIGS)
def test_balanced_graphs_compute_the_same_bit_for_bit(family: str) -> None:
    config, count = CONFIGS[family]
    traced = Traced.of(config)
    if getattr(traced.model.config, "head_dim", None) is None:  # make_inputs reads it
        traced.model.config.head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    with torch.no_grad():
        for parameter in traced.model.parameters():
            if parameter.dim() == 1:  # biases and norms
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    program = traced.program.clone()
    if family == "phi3, up first":
        assert {each.begin for each in balanceable(with_up_first(program).graphs["model"])} == {0}
    balanced = program.clone()
    balanced.constants |= (factors := random_factors(program))
    assert len(factors) == count
    balance = BalanceActivations()
    for each, passes in ((program, pruning([1], window=3)), (balanced, [*pruning([1], window=3), balance])):
        PassManager(passes).run(each)
    assert balance.matches == 2 * count  # prefill and decode: a pruned layer is whole in its window
    inputs, weights = make_inputs(traced.model, [9], past=4), traced.model.state_dict()
    for stage in ("prefill", "decode"):
        logits, cache = run_graph(materialise(program.graphs[stage], program, weights), inputs)
        ours, our_cache = run_graph(materialise(balanced.graphs[stage], balanced, weights), inputs)
        assert torch.equal(ours, logits) and all(map(torch.equal, our_cache, cache))


def test_what_has_no_factors_is_left() -> None:
    program = Traced.of(CONFIGS["llama"][0]).program.clone()
    program.constants |= dict([next(iter(random_factors(program).items()))])
    balance = BalanceActivations()
    PassManager([*pruning([]), balance]).run(program)
    assert balance.matches == 2


def test_factors_are_the_features_sizes_on_text() -> None:
    """The root of their size among a token's, and no smaller than an eighth."""
    traced = Traced.of(CONFIGS["llama"][0])
    ids = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for i, layer in enumerate(traced.model.model.layers):
            layer.post_attention_layernorm.weight[3] = 300
            layer.post_attention_layernorm.weight[4] = 0
            for name in ("gate_proj", "down_proj"):
                into = seen.setdefault(f"model.layers.{i}.mlp.{name}.input_factors", [])
                layer.mlp.get_submodule(name).register_forward_pre_hook(lambda _, x, into=into: into.append(x[0]))
        traced.model(ids)
    factors = input_factors(traced.layers, Rows(ids), lambda *_: None)
    assert factors.keys() == seen.keys()
    for name, (x,) in seen.items():
        even = x / x.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(factors[name], even.square().mean((0, 1)).sqrt().sqrt().clamp(min=1 / 8))
    gate = factors["model.layers.1.mlp.gate_proj.input_factors"]
    assert (gate[3], gate[4]) == (gate.max(), 1 / 8) and gate[3] > 2


def with_outliers(folder: Path) -> PreTrainedModel:
    """A few features of norms and gated units are a hundred times as large as the others, and weights undo that."""
    model = save_tiny(folder, tiny_llama(vocab_size=128, num_hidden_layers=3, max_position_embeddings=256))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[:3] *= 100
            layer.mlp.up_proj.weight[:3] *= 100
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight[:, :3] /= 100
    model.save_pretrained(folder)
    return model


def test_outliers_cost_others_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a variant of the package, which reads the same scaled weights and knows of no factors."""
    model = with_outliers(tmp_path / "model")
    text = save_words(tmp_path / "words.txt", 3, 4000)
    options = {"layers": "1", "calibration": str(text), "refinement_steps": 0, "window": 4, "dtype": "w8a8"}
    ids = torch.randint(2, 120, (4, 40), generator=torch.Generator().manual_seed(0))

    def error(package: Path) -> float:
        with torch.no_grad():
            return float((popcompile.load(package)(ids).logits - model(ids, use_cache=False).logits).square().mean())

    balanced, plain = tmp_path / "balanced", tmp_path / "plain"
    popcompile.convert(tmp_path / "model", balanced, **options)
    monkeypatch.setattr(plan, "input_factors", lambda *_: {})
    popcompile.convert(tmp_path / "model", plain, **options)
    assert error(balanced) < 0.1 * error(plain)
    assert verify(balanced)
    variants = [Variants(package).drop(tmp_path / f"{package.name}-dropped", [1]) for package in (balanced, plain)]
    del model.model.layers[1]
    assert error(variants[0]) < 0.1 * error(variants[1])
