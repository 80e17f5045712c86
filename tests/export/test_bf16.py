"""bf16, which only GPUs have kernels for: what a package holds, and what its graphs compute once they are widened."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import tiny_gemma3, tiny_model
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from reference import pop_prefill
from transformers import PreTrainedModel

import popcompile
from popcompile.package.manifest import read_manifest
from popcompile.runtime.cache import KVCache
from popcompile.runtime.weights import SharedWeights

PRUNED = [1]
IDS = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Its weights are numbers of bf16."""
    return tiny_model(tiny_gemma3()).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def package(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    model.save_pretrained(folder / "model")
    options = {"kv_projection": "layer", "dtype": "bf16", "provider": "cuda", "window": 3}
    popcompile.convert(folder / "model", folder / "out", layers="1", **options)
    return folder / "out"


def widened(path: Path) -> onnx.ModelProto:
    """The graph with fp32 wherever it has bf16."""
    model = onnx.load(path, load_external_data=False)
    load_external_data_for_model(model, str(path.parent))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    graphs = [model.graph]
    for graph in graphs:
        for node in graph.node:
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            if node.op_type == "Cast" and node.attribute[0].i == TensorProto.BFLOAT16:
                node.attribute[0].i = TensorProto.FLOAT
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def test_weights_are_the_checkpoint_s(model: PreTrainedModel, package: Path) -> None:
    graph = onnx.load(package / "decode.onnx", load_external_data=False).graph
    weights = SharedWeights(package / read_manifest(package).weights, "cpu")
    embedding = next(t for t in graph.initializer if t.name == "model.embed_tokens.weight")
    stored = torch.utils.dlpack.from_dlpack(weights._value(embedding))
    assert torch.equal(stored, model.get_input_embeddings().weight)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_logits_are_fp32_and_the_cache_bf16(stage: str, package: Path) -> None:
    graph = onnx.load(package / f"{stage}.onnx", load_external_data=False).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert types.pop("logits") == TensorProto.FLOAT
    assert {types.pop("input_ids"), types.pop("attention_mask")} == {TensorProto.INT64}
    assert set(types.values()) == {TensorProto.BFLOAT16}


def test_graphs_are_the_model(model: PreTrainedModel, package: Path) -> None:
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        expected = {"prefill": pop_prefill(exact, IDS, PRUNED, window=3)[0], "decode": exact(IDS).logits}
    for stage, logits in expected.items():
        session = ort.InferenceSession(widened(package / f"{stage}.onnx").SerializeToString())
        feed = {"input_ids": IDS.numpy(), "attention_mask": np.ones(IDS.shape, np.int64)}
        shape = (1, read_manifest(package).num_kv_heads, 0, read_manifest(package).head_size)
        feed |= {i.name: np.zeros(shape, np.float32) for i in session.get_inputs()[2:]}
        computed = torch.from_numpy(session.run(["logits"], feed)[0])
        # computed in fp32; scales and the tables of cosines keep bf16's 8 bits
        tolerance = 0.03 * float(logits.abs().max())
        torch.testing.assert_close(computed.squeeze(), logits.squeeze(), atol=tolerance, rtol=0)


def test_the_cpu_has_no_kernels(package: Path) -> None:
    with pytest.raises(popcompile.PopcompileError, match=r"computes in bf16, .* no kernels for on cpu; convert with"):
        popcompile.load(package)


def test_cache() -> None:
    """Everything that moves entries, in a type that numpy does not have."""
    rows = torch.randn(2, 1, 6, 4).to(torch.bfloat16)
    cache = KVCache([ort.OrtValue.from_dlpack(rows.clone())], [6, 3])
    cache.reserve(7)
    assert cache.slots > 6 and torch.equal(cache.tensors()[0], rows)
    caches = [cache.row(0), copy.deepcopy(cache.row(1))]
    assert torch.equal(caches[1].tensors()[0], rows[1:, :, :3])
    cache.assign(caches[::-1])
    assert cache.lengths == [3, 6] and torch.equal(cache.tensors()[0][1], rows[0])
