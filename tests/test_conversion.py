"""What conversion makes of options that the real models' packages do not use."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir
import pytest
import torch
from conftest import tiny_gemma3, tiny_llama, tiny_model
from reference import pop_prefill
from transformers import AutoModelForCausalLM

import popcompile
from popcompile.package.manifest import read_manifest
from popcompile.runtime.verify import verify

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tiny_model(tiny_llama(num_hidden_layers=4))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_scattered_layers_by_the_api(checkpoint: Path, tmp_path: Path) -> None:
    manifest = popcompile.convert(checkpoint, tmp_path / "out", layers="0,2", kv_projection="layer", window=6)
    assert (manifest.pruned, manifest.window) == ([0, 2], 6)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    logits = popcompile.load(tmp_path / "out")(ids, prefill="pop").logits
    torch.testing.assert_close(logits, pop_prefill(model, ids, [0, 2], window=6)[0], atol=1e-4, rtol=0)


def test_converting_twice_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        popcompile.convert(checkpoint, tmp_path / name, prune=1)
        files.append(read_manifest(tmp_path / name).files)
    reports = [f.pop("report.json") for f in files]  # holds seconds
    assert files[0] == files[1]
    assert all(r["size"] for r in reports)


def test_fp16(tmp_path: Path) -> None:
    model = tiny_model(tiny_gemma3())
    model.save_pretrained(tmp_path / "model")
    manifest = popcompile.convert(tmp_path / "model", tmp_path / "out", prune=1, dtype="fp16")
    assert manifest.dtype == "fp16"
    assert len(verify(tmp_path / "out")) == 4
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    loaded = popcompile.load(tmp_path / "out")
    with torch.no_grad():
        expected = model(ids).logits
    # fp16 has 11 bits; sums over 64 features and three layers lose a few of them
    torch.testing.assert_close(loaded(ids).logits.float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_fp16_weights_are_widened_once(stage: str, tmp_path: Path) -> None:
    """Not in a branch, where ONNX Runtime would do it at every run."""
    tiny_model(tiny_gemma3()).save_pretrained(tmp_path / "model")
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", dtype="fp16")
    graph = onnx_ir.load(tmp_path / "out" / f"{stage}.onnx").graph
    products = [node for node in graph.all_nodes() if node.op_type in ("MatMul", "FusedMatMul")]
    widened = {node.inputs[0].name: node.outputs[0] for node in graph if node.op_type == "Cast"}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= set(widened) <= set(graph.initializers)
    assert products and {node.inputs[1] for node in products} == set(widened.values())


def test_random_weights_need_only_a_config(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(popcompile.PopcompileError):
        popcompile.convert(checkpoint, tmp_path / "out", prune=1)
    popcompile.convert(checkpoint, tmp_path / "out", random_weights=True)
    assert len(verify(tmp_path / "out")) == 4


def test_remote_code_runs_only_when_trusted(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text(REMOTE_CODE)
    with pytest.raises(popcompile.PopcompileError, match="trust-remote-code"):
        popcompile.convert(checkpoint, tmp_path / "out", prune=1)
    assert not (tmp_path / "out").exists()
    popcompile.convert(checkpoint, tmp_path / "out", prune=1, trust_remote_code=True)
    assert read_manifest(tmp_path / "out").model_type == "own"
