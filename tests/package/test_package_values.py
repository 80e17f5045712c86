"""Manifests and graphs whose values nobody has exported, with hashes that are right: one line, and never a signal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bad_input import Cli, assert_one_line, popcompile, refusal
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from resign import sign

from popcompile.package.graph_check import read_graphs
from popcompile.package.manifest import read_manifest
from popcompile.runtime.session import Runtime

# --- manifests -------------------------------------------------------------------------------------------------

SHA = "0" * 64
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"vocab_size": 0}, "field vocab_size is 0, out of range (1 to "),
    "a large vocabulary": ({"vocab_size": 10**12}, "field vocab_size is 1000000000000, out of range"),
    "another vocabulary": ({"vocab_size": 127}, "has logits that are not [batch, tokens, 127]"),
    "no heads": ({"num_kv_heads": 0}, "field num_kv_heads is 0, out of range"),
    "other heads": ({"num_kv_heads": 1}, "has attention of 4 heads over 2 of keys and values, and the manifest's"),
    "negative heads": ({"num_kv_heads": -2}, "field num_kv_heads is -2, out of range"),
    "another head size": ({"head_size": 16}, "is not [batch, 2, tokens, 16]"),
    "no layers": ({"num_layers": 0, "pruned": []}, "field num_layers is 0, out of range"),
    "many layers": ({"num_layers": 10**9}, "field num_layers is 1000000000, out of range"),
    "another layer": ({"num_layers": 3}, "field inputs has other names than those of 3 layers"),
    "no context": ({"context_length": 0}, "field context_length is 0, out of range"),
    "no outputs": ({"outputs": []}, "field outputs has other names than those of 2 layers"),
    "no inputs": ({"inputs": []}, "field inputs has other names than those of 2 layers"),
    "a layer that is not there": ({"pruned": [2]}, "field pruned is no ascending list of layers from 0 to 1"),
    "a negative layer": ({"pruned": [-1]}, "field pruned is no ascending list"),
    "a layer twice": ({"pruned": [1, 1]}, "field pruned is no ascending list"),
    "dtype": ({"dtype": "fp8"}, "field dtype is 'fp8', none of fp32, fp16"),
    "blocks without": ({"block_size": 32}, "field block_size is 32, which does not go with dtype fp32"),
    "provider": ({"provider": "\x1b[31mred"}, r"field provider is '\x1b[31mred', none of cpu, cuda"),
    "layout": ({"layout": "unified"}, "field graphs has other graphs than prefill, which the unified layout has"),
    "projection": ({"kv_projection": ""}, "field kv_projection is '', none of calibrated, layer"),
    "window": ({"window": 0}, "field window is 0, out of range"),
    "one graph twice": ({"graphs": dict.fromkeys(("prefill", "decode"), "decode.onnx")}, "name one file twice"),
    "a graph as weights": ({"weights": "prefill.onnx"}, "fields graphs and weights name one file twice"),
    "no name": ({"source": {}}, "field source has no name"),
    "a name that is none": ({"source": {"name": 1}}, "field source has no name"),
    "a hash that is none": ({"source": {"name": "x", "adapter": [1]}}, "field source has a wrong value ('adapter')"),
    "model type": ({"model_type": "gpt2"}, "config.json is of another model type than the manifest"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values_in_manifests(case: str, cli: Cli, package: Path) -> None:
    changes, words = VALUES[case]
    sign(package, **changes)
    for command, arguments in (
        ("run", ["--prompt", "the cat", "--max-new-tokens", "2"]),
        ("verify", []),
        ("inspect", []),
    ):
        if case == "model type" and command != "run":
            continue  # what is neither loaded nor compiled again
        assert words in cli.refuses(command, package, *arguments)


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"size": -1, "sha256": SHA}, "field files has a wrong size of 'x'"),
    "a size in words": ({"size": "1", "sha256": SHA}, "field files has a wrong size of 'x'"),
    "no size": ({"sha256": SHA}, "field files has other fields of 'x' than size and sha256"),
    "a hash in capitals": ({"size": 1, "sha256": "A" * 64}, "field files has a wrong hash of 'x'"),
    "a hash that is none": ({"size": 1, "sha256": None}, "field files has a wrong hash of 'x'"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_files_in_manifests(case: str, package: Path) -> None:
    entry, words = ENTRIES[case]
    sign(package, files=read_manifest(package).files | {"x": entry})
    assert words in refusal(lambda: read_manifest(package))


@pytest.mark.parametrize(
    "name", ["a\nb", "\x1b]0;x\x07", "a\x00b", "\ud800", "x" * 300, "a//b", "./a", "a/", "popcompile.json"]
)
def test_names_in_manifests(name: str, cli: Cli, package: Path) -> None:
    sign(package, files=read_manifest(package).files | {name: {"size": 1, "sha256": SHA}})
    line = cli.refuses("verify", package)
    assert f"the manifest names {name[:80]!r}, which no package has; do not use it" in line and "\x1b" not in line


def test_empty_weights(cli: Cli, package: Path) -> None:
    (package / "weights.onnx.data").write_bytes(b"")
    sign(package)
    assert "field files has an empty weights.onnx.data" in cli.refuses("verify", package)


@pytest.mark.parametrize("layers", [10**9, 3, 0, -1, "2", [2]])
def test_configs_of_other_models(layers: Any, cli: Cli, package: Path) -> None:
    path = package / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    sign(package)
    line = cli.refuses("run", package, "--prompt", "the", "--max-new-tokens", "2")
    assert f"config.json says num_hidden_layers '{layers}', the manifest 2; convert the model again" in line


# --- graphs ----------------------------------------------------------------------------------------------------


def nodes_of(graph: GraphProto) -> list[NodeProto]:
    """Those of its branches and loops too."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for g in inner for node in nodes_of(g))]


def set_attribute(op: str, name: str, value: Any) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        node = next(n for n in nodes_of(graph) if n.op_type == op)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def rename(op: str, to: str, domain: str = "") -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        node = next(n for n in nodes_of(graph) if n.op_type == op)
        node.op_type, node.domain = to, domain

    return change


def set_constant(like: Callable[[GraphProto], str], value: int) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == like(graph))
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[:] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def divisor(graph: GraphProto) -> str:
    """The name of a constant that a number of tokens is divided by."""
    constants = {t.name for t in graph.initializer}
    return next(n.input[1] for n in nodes_of(graph) if n.op_type == "Div" and n.input[1] in constants)


def endless(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(1 << 17), "forever"))
    next(n for n in nodes_of(graph) if n.op_type == "Loop").input[0] = "forever"


def scan(graph: GraphProto) -> None:
    """One that counts more inputs than it has."""
    body = helper.make_graph([], "body", [], [])
    graph.node.append(helper.make_node("Scan", ["input_ids"], ["scanned"], body=body, num_scan_inputs=2))


def external(key: str, value: str) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


def set_dims(*dims: int) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.external_data)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def set_dtype(dtype: int) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        next(t for t in graph.initializer if t.external_data).data_type = dtype

    return change


def rename_output(graph: GraphProto) -> None:
    graph.output[1].name = "other"


GRAPHS: dict[str, tuple[Callable[[GraphProto], None], str]] = {
    "heads": (set_attribute("GroupQueryAttention", "num_heads", 1 << 40), "GroupQueryAttention whose num_heads is out"),
    "no heads": (set_attribute("GroupQueryAttention", "num_heads", 0), "GroupQueryAttention whose num_heads is out"),
    "heads in words": (set_attribute("GroupQueryAttention", "num_heads", "4"), "whose num_heads is out of range"),
    "other heads": (set_attribute("GroupQueryAttention", "num_heads", 5), "has attention of 5 heads over 2 of keys"),
    "kv heads": (set_attribute("GroupQueryAttention", "kv_num_heads", 4), "has attention of 4 heads over 4 of keys"),
    "scale": (set_attribute("GroupQueryAttention", "scale", float("nan")), "whose scale is out of range"),
    "unknown attribute": (set_attribute("GroupQueryAttention", "kv_cache_bit_width", 8), "an attribute kv_cache_bit"),
    "axis": (set_attribute("Concat", "axis", 1 << 40), "has a Concat whose axis is out of range"),
    "perm": (set_attribute("Transpose", "perm", [0, 1, 2, 99]), "has a Transpose whose perm is out of range"),
    "operator": (rename("Sigmoid", "Loopback"), "has an operator ::Loopback, which no package has"),
    "domain": (rename("Sigmoid", "Sigmoid", "evil.example"), "has an operator evil.example::Sigmoid"),
    "division by zero": (set_constant(divisor, 0), "divides integers by what may be zero"),
    "division by less": (set_constant(divisor, -1), "divides integers by what may be zero"),
    "large integers": (set_constant(divisor, 1 << 40), "with values out of range"),
    "a scan": (scan, "has a Scan that does not hand each of its inputs over, row by row"),
    "a loop": (endless, "has a Loop that may not end"),
    "place": (external("offset", str(1 << 40)), "outside of the weights file"),
    "negative place": (external("offset", "-4096"), "at no place of the weights file"),
    "length": (external("length", "1"), "outside of the weights file"),
    "dims": (set_dims(1 << 39, 1 << 39), "outside of the weights file"),
    "negative dims": (set_dims(-1, 4), "in a shape that no tensor has"),
    "dtype": (set_dtype(TensorProto.STRING), "in a type that no package has"),
    "outputs": (rename_output, "has other inputs or outputs than the manifest"),
}  # fmt: skip


def change_graph(package: Path, change: Callable[[GraphProto], None], name: str = "prefill.onnx") -> None:
    model = onnx.load(package / name, load_external_data=False)
    change(model.graph)
    (package / name).write_bytes(model.SerializeToString())
    sign(package)


@pytest.mark.parametrize("case", GRAPHS)
def test_values_in_graphs(case: str, package: Path) -> None:
    change, words = GRAPHS[case]
    change_graph(package, change)
    message = refusal(lambda: Runtime(package))
    assert words in message and "do not use it, convert the model again" in message
    assert message == refusal(lambda: read_graphs(package, read_manifest(package)))


def test_attention_of_many_heads_in_a_process(cli: Cli, package: Path) -> None:
    """What ends with SIGFPE in ONNX Runtime."""
    change_graph(package, GRAPHS["heads"][0])
    done = popcompile("verify", package)
    assert_one_line(done.returncode, done.stdout, done.stderr)
    for arguments in (["run", package, "--prompt", "the"], ["inspect", package]):
        cli.refuses(*arguments)


def test_a_graph_that_unpacks_to_much(package: Path) -> None:
    """Millions of empty nodes."""
    empty = onnx.ModelProto(graph=GraphProto(node=[NodeProto()] * 300_000)).SerializeToString()
    (package / "prefill.onnx").write_bytes(empty)
    sign(package)
    assert "has more than 200000 nodes" in refusal(lambda: Runtime(package))


def other_queries(graph: GraphProto) -> None:
    """Half as many heads, of twice the width: each number is right alone, and the cache's heads are of another."""
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if node.op_type == "GroupQueryAttention" and attribute.name == "num_heads":
                attribute.i = 2


def test_what_fails_when_it_runs(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime finds out then; it writes of it on stderr itself, in color, and raises exceptions of its own."""
    change_graph(package, other_queries)
    capfd.readouterr()
    runtime = Runtime(package)
    message = refusal(lambda: runtime.feed([torch.arange(5)], runtime.new_cache(1), "prefill"))
    assert "prefill.onnx fails in onnxruntime" in message and "`popcompile verify`" in message
    assert capfd.readouterr() == ("", "")


def test_what_fails_when_it_runs_in_one_line(cli: Cli, package: Path) -> None:
    change_graph(package, other_queries)
    assert "prefill.onnx fails in onnxruntime" in cli.refuses("verify", package)
