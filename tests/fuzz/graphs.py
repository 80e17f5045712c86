"""Damaged ONNX graphs in packages whose hashes are right: structure first, bytes too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

from fuzz.case import Case, Workspace
from fuzz.hostile import damage_bytes, short
from fuzz.packages import case, command, copy_base, sign

INTEGERS = [0, 1, -1, 2, 3, 7, 8, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 127, 129, 4096]
DIMENSIONS = [0, 1, -1, 2, 7, 129, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1]
FLOATS = [0.0, -1.0, 1e38, -1e38, float("nan"), float("inf"), 1e-45]
TEXTS = ["", "x", "\x00", "a" * 5000, "\x1b[2J", "é"]
DTYPES = [*range(24), 99, -1]
OPERATORS = [
    "Add", "MatMul", "Gather", "Reshape", "Identity", "Loop", "If", "Scan", "Shape", "Softmax", "Cast", "Concat",
    "Split",
    "GroupQueryAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
    "MatMulNBits", "NoSuchOperator", "", "ConstantOfShape", "Range", "Expand", "TensorScatter", "Slice",
    "MultiHeadAttention",
]  # fmt: skip
NAMES = ["", "nowhere", "input_ids", "logits", "attention_mask", "past_key_values.0.key", "\x00", "a" * 5000]


def make(rng: Random, workspace: Workspace) -> Case:
    package, base = copy_base(rng, workspace)
    path = rng.choice(sorted(package.glob("*.onnx")))
    if rng.random() < 0.2:
        content, words = damage_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
    else:
        model = onnx.load(path, load_external_data=False)
        words = "; ".join(_mutate(rng, model) for _ in range(rng.choice([1, 1, 1, 2, 3])))
        path.write_bytes(model.SerializeToString())
    sign(package)
    parts = command(rng, *rng.choice([("verify",), ("run",), ("load",)]))
    if path.name == "decode.onnx" and parts[0] == "run":
        parts += ["--prefill", "full"] if "--prefill" not in parts else []
    return case(f"{path.name}, signed: {words}", parts, "any", base)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs(inner)


def _mutate(rng: Random, model: onnx.ModelProto) -> str:
    graph = rng.choice([model.graph, *graphs(model.graph)])
    choices: dict[Callable[..., str], int] = {
        _attribute: 6, _inputs: 4, _outputs: 2, _operator: 2, _nodes: 3, _initializer: 6, _external: 3, _values: 4,
        _opset: 2, _whole: 1,
    }  # fmt: skip
    for _ in range(20):
        done = rng.choices(list(choices), list(choices.values()))[0](rng, model, graph)
        if done:
            return str(done)
    return "nothing"


def _node(rng: Random, graph: onnx.GraphProto) -> tuple[onnx.NodeProto | None, str]:
    if not graph.node:
        return None, ""
    kinds = sorted({node.op_type for node in graph.node})
    kind = rng.choice(kinds)
    node = rng.choice([node for node in graph.node if node.op_type == kind])
    return node, f"{kind} {node.name or (node.output[0] if node.output else '')}"


def _attribute(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    node, where = _node(rng, graph)
    if node is None:
        return ""
    if not node.attribute or rng.random() < 0.1:
        name = rng.choice(
            ["axis", "num_heads", "kv_num_heads", "to", "x", "", "local_window_size", "softcap", "block_size"]
        )
        value = rng.choice(
            [rng.choice(INTEGERS), rng.choice(FLOATS), rng.choice(TEXTS).replace("\x00", "0"), INTEGERS[:3]]
        )
        node.attribute.append(helper.make_attribute(name, value))
        return f"{where}: attribute {name!r} = {short(value)} is added"
    attribute = rng.choice(list(node.attribute))
    name, how = attribute.name, rng.choice(["value"] * 6 + ["remove", "twice", "type", "rename"])
    if how == "remove":
        node.attribute.remove(attribute)
        return f"{where}: attribute {name} is removed"
    if how == "twice":
        node.attribute.append(attribute)
        return f"{where}: attribute {name} is there twice"
    if how == "type":
        attribute.type = rng.choice(list(AttributeProto.AttributeType.values()))
        return f"{where}: attribute {name} says it has type {attribute.type}"
    if how == "rename":
        attribute.name = rng.choice(["", "x", "axis", "num_heads"])
        return f"{where}: attribute {name} is called {attribute.name!r}"
    value: Any
    if attribute.type == AttributeProto.INT:
        value = attribute.i = rng.choice([*INTEGERS, attribute.i + 1, -attribute.i])
    elif attribute.type == AttributeProto.FLOAT:
        value = attribute.f = rng.choice(FLOATS)
    elif attribute.type == AttributeProto.STRING:
        value = attribute.s = rng.choice(TEXTS).encode()
    elif attribute.type == AttributeProto.INTS:
        value = rng.choice([[], [rng.choice(INTEGERS)], [*attribute.ints, 1], [rng.choice(INTEGERS)] * 9])
        attribute.ClearField("ints")
        attribute.ints.extend(value)
    elif attribute.type == AttributeProto.TENSOR:
        return f"{where}: attribute {name}: {_tensor(rng, attribute.t)}"
    else:
        return ""
    return f"{where}: attribute {name} = {short(value)}"


def _other_name(rng: Random, graph: onnx.GraphProto) -> str:
    pool = [v.name for v in (*graph.input, *graph.output, *graph.initializer)] + [
        o for n in graph.node for o in n.output
    ]
    return str(rng.choice([rng.choice(NAMES).replace("\x00", "0"), *rng.choices(pool or [""], k=4)]))


def _inputs(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    node, where = _node(rng, graph)
    if node is None:
        return ""
    how = rng.choice(["rewire"] * 4 + ["drop", "add", "clear", "own"])
    if how == "add" or not node.input:
        node.input.append(_other_name(rng, graph))
        return f"{where}: an input more, {short(node.input[-1])}"
    index = rng.randrange(len(node.input))
    if how == "drop":
        del node.input[index]
        return f"{where}: input {index} is dropped"
    if how == "clear":
        node.input[index] = ""
        return f"{where}: input {index} is left out"
    node.input[index] = node.output[0] if how == "own" and node.output else _other_name(rng, graph)
    return f"{where}: input {index} is {short(node.input[index])}"


def _outputs(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    node, where = _node(rng, graph)
    if node is None or not node.output:
        return ""
    index, how = rng.randrange(len(node.output)), rng.choice(["rename", "drop", "add", "twice"])
    if how == "drop":
        del node.output[index]
        return f"{where}: output {index} is dropped"
    if how == "rename":
        node.output[index] = _other_name(rng, graph)
        return f"{where}: output {index} is called {short(node.output[index])}"
    node.output.append(node.output[index] if how == "twice" else "more")
    return f"{where}: an output more, {node.output[-1]}"


def _operator(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    node, where = _node(rng, graph)
    if node is None:
        return ""
    if rng.random() < 0.3:
        node.domain = rng.choice(["", "ai.onnx", "com.microsoft", "x", "ai.onnx.ml", "pkg.torch"])
        return f"{where}: domain {node.domain!r}"
    node.op_type = rng.choice(OPERATORS)
    if rng.random() < 0.3:
        node.domain = rng.choice(["", "com.microsoft"])
    return f"{where} becomes {node.domain}::{node.op_type}"


def _nodes(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    node, where = _node(rng, graph)
    if node is None:
        return ""
    how = rng.choice(["remove", "twice", "order", "empty", "deep"])
    if how == "remove":
        graph.node.remove(node)
        return f"{where} is removed"
    if how == "twice":
        graph.node.append(node)
        return f"{where} is there twice"
    if how == "order":
        nodes = list(graph.node)
        rng.shuffle(nodes)
        graph.ClearField("node")
        graph.node.extend(nodes)
        return "nodes in another order"
    if how == "empty":
        graph.ClearField("node")
        return "no nodes"
    depth = rng.choice([20, 45, 400])
    inner = helper.make_graph([helper.make_node("Constant", [], ["v"], value_int=1)], "g", [],
                              [helper.make_tensor_value_info("v", TensorProto.INT64, [])])  # fmt: skip
    for level in range(depth if depth < 100 else 30):
        branch = helper.make_node("If", ["nowhere"], [f"v{level}"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph(
            [branch], "g", [], [helper.make_tensor_value_info(f"v{level}", TensorProto.INT64, [])]
        )
        if inner.ByteSize() > 1 << 20:
            break
    graph.node.append(helper.make_node("If", ["nowhere"], ["deep"], then_branch=inner, else_branch=inner))
    return f"If in If, {level + 1} deep"


def _tensor(rng: Random, tensor: onnx.TensorProto) -> str:
    how, name = rng.choice(["dims", "dims", "type", "data", "rename", "clear"]), tensor.name
    if how == "dims":
        dims = list(tensor.dims)
        if dims and rng.random() < 0.7:
            dims[rng.randrange(len(dims))] = rng.choice(DIMENSIONS)
        else:
            dims = rng.choice([[], [*dims, 1], dims[::-1], [rng.choice(DIMENSIONS)] * 3, [1] * 70])
        tensor.ClearField("dims")
        tensor.dims.extend(dims)
        return f"tensor {name} has dims {dims}"
    if how == "type":
        tensor.data_type = rng.choice(DTYPES)
        return f"tensor {name} has type {tensor.data_type}"
    if how == "rename":
        tensor.name = rng.choice(NAMES).replace("\x00", "0")
        return f"tensor {name} is called {short(tensor.name)}"
    if how == "clear":
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        return f"tensor {name} has no data"
    size = len(tensor.raw_data)
    tensor.raw_data = rng.choice(
        [b"", b"\xff" * size, b"\x7f" * size, bytes(size), tensor.raw_data[: size // 2], b"1" * 3]
    )
    return f"tensor {name} has data {short(tensor.raw_data)}"


def _initializer(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    if not graph.initializer:
        return ""
    small = [t for t in graph.initializer if not t.external_data]
    tensor = rng.choice(small if small and rng.random() < 0.4 else list(graph.initializer))
    how = rng.choice(["tensor"] * 5 + ["remove", "twice"])
    if how == "remove":
        graph.initializer.remove(tensor)
        return f"initializer {tensor.name} is removed"
    if how == "twice":
        graph.initializer.append(tensor)
        return f"initializer {tensor.name} is there twice"
    return _tensor(rng, tensor)


def _external(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    stored = [t for t in graph.initializer if t.external_data]
    if not stored:
        return ""
    tensor = rng.choice(stored)
    entry = rng.choice(list(tensor.external_data))
    values = {
        "location": [
            "../outside/secret",
            "/etc/passwd",
            "",
            ".",
            "config.json",
            "a" * 5000,
            "weights.onnx.data/../x",
            "\x1b",
        ],
        "offset": ["-1", "x", "", "1", "7", "999999999999", str(1 << 63), "1e3", "0x10", " 4", "\u0661"],
        "length": ["-1", "x", "", "1", "0", "999999999999", str(1 << 63), "4.5"],
    }
    how, key = rng.choice(["value"] * 5 + ["drop", "twice", "inline", "unknown"]), entry.key
    if how == "drop":
        tensor.external_data.remove(entry)
        return f"tensor {tensor.name}: no {key}"
    if how == "twice":
        tensor.external_data.append(entry)
        return f"tensor {tensor.name}: {key} twice"
    if how == "inline":
        tensor.data_location = TensorProto.DEFAULT
        return f"tensor {tensor.name} says that its data is inside"
    if how == "unknown":
        tensor.external_data.add(key=rng.choice(["", "checksum", "basepath"]), value="../outside")
        return f"tensor {tensor.name}: an entry more"
    entry.value = rng.choice(values.get(key, ["x"]))
    return f"tensor {tensor.name}: {key} = {short(entry.value)}"


def _values(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    """Inputs, outputs and shapes of values between them."""
    field = rng.choice(["input", "output", "output", "value_info"])
    values = getattr(graph, field)
    if not values:
        return ""
    value = rng.choice(list(values))
    name, how = value.name, rng.choice(["dim"] * 4 + ["type", "rank", "rename", "remove", "twice", "order", "kind"])
    shape = value.type.tensor_type.shape.dim
    if how == "dim" and len(shape):
        index = rng.randrange(len(shape))
        if rng.random() < 0.3:
            shape[index].dim_param = rng.choice(["", "x", "batch_size", "total_sequence_length"])
        else:
            shape[index].dim_value = rng.choice(DIMENSIONS)
        return f"{field} {name}: dimension {index} is {shape[index].dim_param or shape[index].dim_value}"
    if how == "type":
        value.type.tensor_type.elem_type = rng.choice(DTYPES)
        return f"{field} {name} has type {value.type.tensor_type.elem_type}"
    if how == "rank":
        shape.add().dim_value = rng.choice(DIMENSIONS)
        return f"{field} {name}: a dimension more"
    if how == "kind":
        value.type.Clear()
        if rng.random() < 0.5:
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1
        return f"{field} {name} is no tensor"
    if how == "rename":
        value.name = rng.choice(NAMES).replace("\x00", "0")
        return f"{field} {name} is called {short(value.name)}"
    if how == "remove":
        values.remove(value)
        return f"{field} {name} is removed"
    if how == "twice":
        values.append(value)
        return f"{field} {name} is there twice"
    if how == "order":
        every = list(values)
        rng.shuffle(every)
        graph.ClearField(field)
        getattr(graph, field).extend(every)
        return f"{field}s in another order"
    return ""


def _opset(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    how = rng.choice(["version", "version", "clear", "twice", "ir", "domain", "function"])
    if how == "version" and model.opset_import:
        opset = rng.choice(list(model.opset_import))
        opset.version = rng.choice([0, 1, 6, 13, 17, 999, -1, (1 << 63) - 1])
        return f"opset {opset.domain!r} has version {opset.version}"
    if how == "clear":
        model.ClearField("opset_import")
        return "no opsets"
    if how == "twice":
        model.opset_import.add(domain="", version=rng.choice([1, 999]))
        return "an opset twice"
    if how == "ir":
        model.ir_version = rng.choice([0, 1, 3, 999, -1])
        return f"IR version {model.ir_version}"
    if how == "domain":
        model.opset_import.add(domain=rng.choice(["x", "a" * 5000, "com.microsoft.nchwc"]), version=1)
        return "an opset more"
    nodes = [helper.make_node("Add", ["a", "a"], ["b"])]
    kind = rng.choice(["Add", "GroupQueryAttention", "F"])
    domain = rng.choice(["", "com.microsoft", "x"])
    model.functions.append(helper.make_function(domain, kind, ["a"], ["b"], nodes, list(model.opset_import)))
    return f"a function {domain}::{kind}"


def _whole(rng: Random, model: onnx.ModelProto, graph: onnx.GraphProto) -> str:
    how = rng.choice(["no graph", "empty", "names only"])
    if how == "no graph":
        model.ClearField("graph")
    elif how == "empty":
        model.Clear()
    else:
        top, kept = model.graph, [(list(model.graph.input), list(model.graph.output))]
        top.Clear()
        top.name = "empty"
        top.input.extend(kept[0][0])
        top.output.extend(kept[0][1])
    return how
