"""int8 and int4: the model with rounded weights, each stored once for both graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from conftest import tiny_gemma3, tiny_llama, tiny_model
from reference import pop_prefill
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config

import popcompile
from popcompile.export.providers import PROVIDERS
from popcompile.package import read_manifest
from popcompile.passes.quantize_linear import quantized_weight, weight_scales
from popcompile.runtime import Runtime
from popcompile.variants import Variants
from popcompile.verify import verify

CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=3),
    "gemma3": tiny_gemma3(),  # the head's weight is the embedding's
    "qwen2": Qwen2Config(  # biases
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    ),
}  # fmt: skip
PRUNED = [1]


def rounded(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """What MatMulNBits multiplies with: (value - 2^(bits - 1)) * scale, blocks along the input features."""
    packed, scales = quantized_weight(weight, bits, block_size), weight_scales(weight, bits, block_size)
    values = torch.stack((packed & 15, packed >> 4), -1).flatten(2) if bits == 4 else packed
    blocks = (values.float() - 2 ** (bits - 1)) * scales[:, :, None]
    return blocks.flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 128), (8, 32)])
def test_weights_are_rounded_within_their_block(bits: int, block_size: int) -> None:
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(0))  # the last block is not whole
    error = (rounded(weight, bits, block_size) - weight).abs()
    for block, scale in zip(error.split(block_size, 1), weight_scales(weight, bits, block_size).T, strict=True):
        # half a step, but a whole one where the positive end has one value less than the negative
        assert (block <= scale.abs()[:, None] * 1.001).all()
        assert (block <= scale.abs()[:, None] * 0.501).float().mean() > 0.9
    assert 0 < error.max() < float(weight.abs().max()) / 2 ** (bits - 2)


def test_many_rows_are_quantized_in_parts() -> None:
    weight = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(weight, 4, 32)[4990:], rounded(weight[4990:], 4, 32), rtol=0, atol=0)


def quantized(model: PreTrainedModel, bits: int, block_size: int) -> PreTrainedModel:
    """transformers' model with rounded weights in its linear layers, and in an embedding that is tied to one."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for weight in {m.weight for m in result.modules() if isinstance(m, torch.nn.Linear)}:
            weight.copy_(rounded(weight, bits, block_size))
    return result


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_package_is_the_model_with_rounded_weights(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = replace(PROVIDERS["cpu"], accuracy_level=0)  # activations are multiplied as they are
    monkeypatch.setitem(PROVIDERS, "cpu", exact)
    model = save(CONFIGS[family], tmp_path / "model")
    manifest = popcompile.convert(
        tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", dtype=dtype, block_size=16
    )
    assert (manifest.dtype, manifest.block_size) == (dtype, 16)
    expected = quantized(model, int(dtype[3:]), 16)
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    loaded = popcompile.load(tmp_path / "out")
    logits, papers = loaded(ids).logits, loaded(ids, prefill="pop").logits
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(ids).logits, atol=2e-3, rtol=0)  # logits are up to 10
        assert (logits - model(ids).logits).abs().max() > 0.02
    torch.testing.assert_close(papers, pop_prefill(expected, ids, PRUNED)[0], atol=2e-3, rtol=0)


def save(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    model = tiny_model(config)
    model.save_pretrained(folder)
    return model


def test_int4_as_it_is_by_default(tmp_path: Path) -> None:
    """Activations in int8 too: near the full weights, equal in both stages as far as they are rounded alike."""
    model = save(CONFIGS["llama"], tmp_path / "model")
    popcompile.convert(tmp_path / "model", tmp_path / "out", prune=1, dtype="int4")
    assert len(verify(tmp_path / "out")) == 3
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = quantized(model, 4, 32)(ids).logits
    difference = (popcompile.load(tmp_path / "out")(ids).logits - exact).abs()
    assert 0 < difference.mean() < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("block_size", [32, 128])
def test_weights_are_stored_once(block_size: int, tmp_path: Path) -> None:
    """The embedding with the LM head, where blocks divide its rows."""
    save(CONFIGS["gemma3"], tmp_path / "model")
    options = {"kv_projection": "layer", "dtype": "int4", "block_size": block_size}
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", **options)
    shared = CONFIGS["gemma3"].hidden_size % block_size == 0
    places = {}
    for stage in ("prefill", "decode"):
        graph = onnx.load(tmp_path / "out" / f"{stage}.onnx", load_external_data=False).graph
        kinds = {node.op_type for node in onnx_ir.from_proto(graph).all_nodes()}
        assert "MatMulNBits" in kinds and not {"MatMul", "FusedMatMul"} & kinds
        assert ("GatherBlockQuantized" in kinds) == shared
        for tensor in graph.initializer:
            place = {e.key: e.value for e in tensor.external_data}
            if place:
                assert places.setdefault(tensor.name, place) == place
    names = set(places)
    assert {"model.embed_tokens.weight_int4", "model.embed_tokens.weight_scales"} <= names
    assert ("model.embed_tokens.weight" in names) != shared
    assert "model.layers.0.mlp.up_proj.weight" not in names


@pytest.mark.parametrize(("family", "dtype"), [("llama", "int4"), ("qwen2", "fp32")])
def test_variants_read_the_packed_weights(family: str, dtype: str, tmp_path: Path) -> None:
    """Another layer is pruned: its K/V projection is a part of what the package has packed."""
    save(CONFIGS[family], tmp_path / "model")
    packages = []
    for pruned in (1, 0):
        out = tmp_path / str(pruned)
        popcompile.convert(tmp_path / "model", out, layers=str(pruned), kv_projection="layer", dtype=dtype)
        packages.append(out)
    variant = Variants(packages[0]).prune(tmp_path / "variant", [0])
    assert read_manifest(variant).pruned == [0]
    ids = torch.randint(64, (20,), generator=torch.Generator().manual_seed(0))
    found = []
    for folder in (variant, packages[1], packages[0]):
        runtime = Runtime(folder)
        cache = runtime.new_cache(1)
        found.append([runtime.feed([ids], cache, "prefill"), *cache.tensors()])
    assert all(torch.equal(ours, direct) for ours, direct in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
