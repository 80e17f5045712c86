"""int8 and int4: the model with rounded weights, each stored once for both graphs; w8a8: with integer products.

The texts in tests/passes/graphs/quantized-Pass.decode.txt are of the tiny Llama of test_passes.py, `--update-graphs`
rewrites them; the graph before them is that after FuseSkipRMSNorm.
"""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from conftest import tiny_gemma3, tiny_llama, tiny_model
from reference import pop_prefill
from rounded_weights import rounded
from steps import GRAPHS, llama_steps, numbered
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config

import popcompile
from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS
from popcompile.package.manifest import read_manifest
from popcompile.passes import PassManager
from popcompile.passes.printing import print_graph
from popcompile.passes.quantize_dynamic import QuantizeDynamic, feature_scales, int8_weight
from popcompile.passes.quantize_linear import Quantization, QuantizeLinear, weight_scales
from popcompile.runtime import session
from popcompile.runtime.session import Runtime
from popcompile.runtime.verify import verify
from popcompile.variants import Variants

CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=3),
    "gemma3": tiny_gemma3(),  # the head's weight is the embedding's
    "qwen2": Qwen2Config(  # biases
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    ),
}  # fmt: skip
PRUNED = [1]


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 128), (8, 32)])
def test_weights_are_rounded_within_their_block(bits: int, block_size: int) -> None:
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(0))  # the last block is not whole
    error = (rounded(weight, bits, block_size) - weight).abs()
    for block, scale in zip(error.split(block_size, 1), weight_scales(weight, bits, block_size).T, strict=True):
        # half a step, but a whole one where the positive end has one value less than the negative
        assert (block <= scale.abs()[:, None] * 1.001).all()
        assert (block <= scale.abs()[:, None] * 0.501).float().mean() > 0.9
    assert 0 < error.max() < float(weight.abs().max()) / 2 ** (bits - 2)


def test_quantizing_leaves_the_callers_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", raising=False)
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own keep basicConfig from doing anything
    level = logging.root.level
    weight_scales(torch.ones(1, 32), 4, 32)
    assert (logging.root.handlers, logging.root.level) == ([], level)


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
        tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", dtype=dtype, block_size=16, window=5
    )
    assert (manifest.dtype, manifest.block_size) == (dtype, 16)
    expected = quantized(model, int(dtype[3:]), 16)
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    loaded = popcompile.load(tmp_path / "out")
    logits, papers = loaded(ids).logits, loaded(ids, prefill="pop").logits
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(ids).logits, atol=2e-3, rtol=0)  # logits are up to 10
        assert (logits - model(ids).logits).abs().max() > 0.02
    torch.testing.assert_close(papers, pop_prefill(expected, ids, PRUNED, window=5)[0], atol=2e-3, rtol=0)


def save(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    model = tiny_model(config)
    model.save_pretrained(folder)
    return model


class DynamicLinear(torch.nn.Module):
    """A linear layer of integers: a scale for every output feature, and one for every token."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        largest = linear.weight.abs().amax(1)
        self.weight, self.bias, self.scales = (
            (linear.weight / largest[:, None] * 127).round(),
            linear.bias,
            largest / 127,
        )

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        product = torch.nn.functional.linear((x / scale).round().double(), self.weight.double())
        out = product.float() * self.scales * scale
        return out if self.bias is None else out + self.bias


def dynamic(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' model with integer products in its layers, but for queries, keys, values and the head: these, and
    an embedding that is tied to it, are rounded in blocks.
    """
    result = quantized(model, 8, 16)
    for layer, original in zip(result.model.layers, model.model.layers, strict=True):
        for path in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            parent, _, name = path.partition(".")
            setattr(getattr(layer, parent), name, DynamicLinear(original.get_submodule(path)))
    return result


@pytest.mark.parametrize(
    ("family", "saturates"), [*((family, None) for family in CONFIGS), ("llama", True), ("gemma3", True)]
)
def test_w8a8_is_the_model_with_integer_products(
    family: str, saturates: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, and a second one after it. Where float rounding tips an activation to the next integer, a token's
    logits are off by what rounding costs: few may be. saturates: what is said of this CPU, by default what is so.
    """
    if saturates is not None:
        monkeypatch.setattr(session, "saturates", lambda: saturates)
    exact = replace(PROVIDERS["cpu"], accuracy_level=0)  # of what is in blocks
    monkeypatch.setitem(PROVIDERS, "cpu", exact)
    model = save(CONFIGS[family], tmp_path / "model")
    options = {"kv_projection": "layer", "dtype": "w8a8", "block_size": 16, "window": 5}
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", **options)
    graph = onnx_ir.from_proto(onnx.load(tmp_path / "out" / "decode.onnx", load_external_data=False).graph)
    kinds = [node.op_type for node in graph.all_nodes()]
    in_blocks = 3 * (3 if family == "gemma3" else 1) + 1  # of each branch: queries, keys and values, packed or not
    assert (kinds.count("MatMulIntegerToFloat"), kinds.count("MatMulNBits")) == (2 * 3 * 4, 2 * in_blocks)
    assert len(verify(tmp_path / "out")) == 4
    expected, loaded = dynamic(model), popcompile.load(tmp_path / "out")
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        errors = (loaded(ids).logits - expected(ids).logits).abs().amax(-1)[0]
        without = (model(ids).logits - expected(ids).logits).abs().amax(-1)[0]
    assert errors.median() < 2e-3 < 0.02 < without.median()
    first = loaded(ids[:, :12], prefill="pop")
    second = loaded(ids[:, 12:], past_key_values=first.past_key_values, prefill="pop")
    papers, cache = pop_prefill(expected, ids[:, :12], PRUNED, window=5)
    again, cache = pop_prefill(expected, ids[:, 12:], PRUNED, cache, window=5)
    for ours, theirs in ((first.logits, papers), (second.logits, again)):
        assert (ours - theirs).abs().max() < 0.5 * float(without.median())


def test_w8a8_weights_are_rounded_within_their_feature() -> None:
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 24)[:, None]
    weight[7] = 0
    values, scales = int8_weight(weight), feature_scales(weight)
    assert (values.shape, values.dtype, scales.dtype) == ((200, 24), torch.int8, torch.float32)
    error = (values.T * scales[:, None] - weight).abs()
    assert (error <= 0.501 * scales[:, None]).all()
    assert (values.abs().amax(0) == 127).sum() == 23 and not values[:, 7].any()


def test_w8a8_tokens_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """Bit for bit: a row beside another one, a prompt with another token at its end, and a token of zeros."""
    model = save(CONFIGS["llama"], tmp_path / "model")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= 1e4
        model.model.embed_tokens.weight[6] = 0
    model.save_pretrained(tmp_path / "model")
    popcompile.convert(tmp_path / "model", tmp_path / "out", prune=0, dtype="w8a8", kv_projection="layer")
    runtime = Runtime(tmp_path / "out")

    def keys(*rows: list[int]) -> list[Tensor]:
        cache = runtime.new_cache(len(rows))
        runtime.feed([torch.tensor(row) for row in rows], cache, "decode")
        assert all(tensor.isfinite().all() for tensor in cache.tensors())
        return [tensor[0, :, :3] for tensor in cache.tensors()]

    alone = keys([1, 2, 3, 4])
    for others in ([[1, 2, 3, 5]], [[1, 2, 3, 6]], [[1, 2, 3, 4], [5, 6, 7, 8]]):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(keys(*others), alone, strict=True))


@pytest.mark.parametrize("name", ["QuantizeDynamic", "QuantizeLinear"])
def test_graph_after(name: str, request: pytest.FixtureRequest) -> None:
    program = llama_steps()["FuseSkipRMSNorm"].program.clone()
    passes = {"QuantizeDynamic": QuantizeDynamic(), "QuantizeLinear": QuantizeLinear(Quantization(bits=4))}
    PassManager([passes[name]]).run(program)
    text, file = print_graph(program.graphs["decode"], "decode"), GRAPHS / f"quantized-{name}.decode.txt"
    if request.config.getoption("--update-graphs"):
        file.write_text(text, encoding="utf-8")
    assert numbered(text).splitlines() == numbered(file.read_text(encoding="utf-8")).splitlines()


def test_int4_as_it_is_by_default(tmp_path: Path) -> None:
    """Activations in int8 too: near the full weights, equal in both stages as far as they are rounded alike."""
    model = save(CONFIGS["llama"], tmp_path / "model")
    popcompile.convert(tmp_path / "model", tmp_path / "out", prune=1, dtype="int4")
    assert len(verify(tmp_path / "out")) == 4
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = quantized(model, 4, 32)(ids).logits
    difference = (popcompile.load(tmp_path / "out")(ids).logits - exact).abs()
    assert 0 < difference.mean() < 0.02 * float(exact.abs().max())


def test_both_sessions_take_packed_weights(tmp_path: Path) -> None:
    """The one that is opened second too: unpacked weights are widened at every call, and activations not rounded."""
    save(CONFIGS["llama"], tmp_path / "model")
    out = tmp_path / "out"
    popcompile.convert(tmp_path / "model", out, layers="1", kv_projection="layer", dtype="int4")
    ids = [torch.randint(64, (20,), generator=torch.Generator().manual_seed(0))]
    runtimes = [Runtime(out), Runtime(out, main="decode"), Runtime(out, low_memory=True)]
    second, first, unpacked = (r.feed(ids, r.new_cache(1), "decode", every_token=True) for r in runtimes)
    assert torch.equal(second, first)
    assert not torch.equal(second, unpacked)
    with pytest.raises(PopcompileError, match=r"low_memory: .* has int4 weights, .* take packed; .* Leave it out"):
        popcompile.load(out, low_memory=True)


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
