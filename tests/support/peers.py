"""Shared by tests of the benchmark: decoders as other tools write them, of one ONNX graph."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from popcompile.package.manifest import LAYOUTS, read_manifest

WEIGHTS = LAYOUTS["split"].weights


def genai_folder(package: Path, folder: Path, **model: Any) -> Path:
    """The package's full model as an onnxruntime-genai model folder; `model` changes its genai_config.json."""
    folder.mkdir(parents=True)
    os.link(package / "decode.onnx", folder / "model.onnx")
    os.link(package / WEIGHTS, folder / WEIGHTS)
    manifest = read_manifest(package)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": manifest.head_size,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": manifest.num_layers,
        "num_key_value_heads": manifest.num_kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    config = {
        "type": "llama",
        "vocab_size": manifest.vocab_size,
        "context_length": manifest.context_length,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "decoder": decoder,
    }
    search = {"do_sample": False, "past_present_share_buffer": True, "max_length": manifest.context_length}
    (folder / "genai_config.json").write_text(json.dumps({"model": config | model, "search": search}))
    return folder


# --- a graph without GroupQueryAttention -----------------------------------------------------------------------

HIDDEN, VOCABULARY = 8, 40


def save_mean_decoder(path: Path, dtype: Any = np.float32, **changes: Any) -> dict[str, Any]:
    """A decoder as optimum names its inputs, with position_ids, whose attention is the mean of all keys so far.

    changes: "input": a name added to the inputs; "past": the cache's length, None for any. Returns its weights by name.
    """
    draw = np.random.default_rng(0)
    shapes = {"tokens": (VOCABULARY, HIDDEN), "places": (64, HIDDEN), "head": (HIDDEN, VOCABULARY)}
    weights = {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def value(name: str, shape: list[Any], element: int = kind) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    past = changes.get("past")
    inputs = [value("input_ids", ["b", "s"], TensorProto.INT64), value("attention_mask", ["b", "t"], TensorProto.INT64)]
    inputs += [value("position_ids", ["b", "s"], TensorProto.INT64)]
    inputs += [value(f"past_key_values.0.{part}", ["b", 1, past or "p", HIDDEN]) for part in ("key", "value")]
    if "input" in changes:
        inputs.append(value(changes["input"], ["b"]))
    outputs = [value("logits", ["b", "s", VOCABULARY])]
    outputs += [value(f"present.0.{part}", ["b", 1, "t", HIDDEN]) for part in ("key", "value")]
    nodes = [
        helper.make_node("Gather", ["tokens", "input_ids"], ["x"]),
        helper.make_node("Gather", ["places", "position_ids"], ["place"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        helper.make_node("ReduceMean", ["present.0.key", "two"], ["mean"], keepdims=0),
        helper.make_node("Add", ["x", "mean"], ["attended"]),
        helper.make_node("Add", ["attended", "place"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    constants = {"one": np.array([1]), "two": np.array([2])} | weights
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "mean", inputs, outputs, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return weights


def mean_decoder_tokens(weights: dict[str, Any], ids: list[int], count: int) -> list[int]:
    """`count` greedy tokens of `save_mean_decoder`'s model."""
    tokens = list(ids)
    for _ in range(count):
        keys = weights["tokens"][tokens]
        y = keys[-1] + keys.mean(0) + weights["places"][len(tokens) - 1]
        tokens.append(int((y @ weights["head"]).argmax()))
    return tokens[len(ids) :]
