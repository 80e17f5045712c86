"""Check a package's graphs before ONNX Runtime sees them, which ends the process on some that nobody has exported.

operators     those of graph_operators.py, with their attributes in range
heads         every attention has the manifest's key/value heads, and a multiple of them
weights       of the sizes that dims say, inside the package's weights file and no other
divisors      integers are divided by what cannot be zero, and Loop and Range go no further than tokens do
I/O           names and shapes are the manifest's
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from popcompile.errors import PopcompileError
from popcompile.package.graph_io import FLOATS, Fault, check_io
from popcompile.package.graph_operators import OPERATORS, Attribute, Floats, Scalar, Subgraph, Words
from popcompile.package.integrity import check_files, read_file
from popcompile.package.manifest import Manifest

_OPSETS = {"": range(21, 25), "com.microsoft": range(1, 2)}
_NODES = 200_000
_DEPTH = 4
#: TensorProto type -> its bytes, and the field that holds values which are not raw
_TYPES: dict[int, tuple[int, str]] = {
    TensorProto.FLOAT: (4, "float_data"),
    TensorProto.FLOAT16: (2, "int32_data"),
    TensorProto.BFLOAT16: (2, "int32_data"),
    TensorProto.UINT8: (1, "int32_data"),
    TensorProto.INT8: (1, "int32_data"),
    TensorProto.BOOL: (1, "int32_data"),
    TensorProto.INT32: (4, "int32_data"),
    TensorProto.INT64: (8, "int64_data"),
}
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)
#: inline integers are sizes and indices, no larger than this or than a dimension of the weights, or "to the end" of a
#: Slice; a tensor may be made that large
_LARGEST, _ENDS = 1 << 18, (1 << 62, (1 << 63) - 1)


#: of operators whose inputs are looked at
_INPUTS = {"GroupQueryAttention": 7, "MatMulNBits": 3, "Div": 2, "Mod": 2, "Loop": 2, "Range": 3, "Slice": 4}


#: inputs with a row for every token, or patch
_COUNTED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values", "image_features")

#: blocks of a Loop, at most, where they are not counted by tokens
_STEPS = 1 << 16


def read_graphs(folder: Path, manifest: Manifest) -> dict[str, tuple[bytes, GraphProto]]:
    """The checked graph of each stage, and the bytes that it was read from.

    Raises PopcompileError for one that this package cannot have.
    """
    return {stage: _read(folder, manifest, stage, name) for stage, name in manifest.graphs.items()}


def check_package(folder: Path, manifest: Manifest) -> None:
    """Check the files of a package, of the weights samples, and its graphs. Raises PopcompileError."""
    check_files(folder, manifest)
    read_graphs(folder, manifest)


def _read(folder: Path, manifest: Manifest, stage: str, name: str) -> tuple[bytes, GraphProto]:
    content = read_file(folder, manifest, name)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own exceptions have no common name in its versions
        raise PopcompileError(f"{folder}: {name} is not a readable ONNX file; convert the model again") from error
    try:
        _check_model(model)
        _Checker(manifest).check(model.graph, {}, 0)
        check_io(model.graph, manifest, stage)
    except Fault as fault:
        raise PopcompileError(f"{folder}: {name}: {fault}; do not use it, convert the model again") from None
    return content, model.graph


def _check_model(model: onnx.ModelProto) -> None:
    if model.functions or model.training_info:
        raise Fault("has functions or training graphs, which no package has")
    for opset in model.opset_import:
        if opset.version not in _OPSETS.get(opset.domain, ()):
            raise Fault(f"asks for operators of {opset.domain!r}, version {opset.version}, which no package has")
    if len(model.opset_import) != len({opset.domain for opset in model.opset_import}):
        raise Fault("names an operator set twice")


class _Checker:
    """Of one model's graph and those inside it."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._weights = int(manifest.files[manifest.weights]["size"])
        self._nodes = 0
        self._largest = _LARGEST
        self._dims: dict[str, Sequence[int]] = {}

    def check(self, graph: GraphProto, outer: Mapping[str, Any], depth: int) -> None:
        """outer: what makes the values of the graphs around this one, by name: a node, or a tensor."""
        if depth > _DEPTH:
            raise Fault("has branches in branches in branches, deeper than any package")
        if graph.sparse_initializer or graph.quantization_annotation:
            raise Fault("has sparse or annotated tensors, which no package has")
        made = dict(outer)
        for tensor in sorted(graph.initializer, key=lambda t: not t.external_data):  # their sizes first
            self._check_tensor(tensor)
            made[tensor.name] = tensor
            self._dims[tensor.name] = tensor.dims
        for value in graph.input if depth else ():
            made[value.name] = value  # of a Loop's body, which hides an outer one
        self._nodes += len(graph.node)
        if self._nodes > _NODES:
            raise Fault(f"has more than {_NODES} nodes")
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
        for node in graph.node:
            made |= dict.fromkeys(filter(None, node.output), node)
        for node in graph.node:
            self._check_node(node, made, types, depth)

    def _check_node(self, node: NodeProto, made: Mapping[str, Any], types: Mapping[str, int], depth: int) -> None:
        known = OPERATORS.get(node.domain, {}).get(node.op_type)
        if known is None:
            raise Fault(f"has an operator {node.domain}::{node.op_type}, which no package has")
        seen = set()
        for attribute in node.attribute:
            expected = known.get(attribute.name)
            if expected is None or attribute.name in seen or attribute.ref_attr_name:
                raise Fault(f"has an attribute {attribute.name} of {node.op_type}, which no package has")
            seen.add(attribute.name)
            if not _fits(attribute, expected):
                raise Fault(f"has a {node.op_type} whose {attribute.name} is out of range")
            if isinstance(expected, Subgraph):
                self.check(attribute.g, made, depth + 1)
        self._check_meaning(node, made, types)

    def _check_meaning(self, node: NodeProto, made: Mapping[str, Any], types: Mapping[str, int]) -> None:
        if len(node.input) < _INPUTS.get(node.op_type, 0) or not node.output:
            raise Fault(f"has a {node.op_type} without its inputs or outputs")
        if node.op_type == "GroupQueryAttention":
            self._check_attention(node)
        elif node.op_type == "MatMulNBits":
            self._check_blocks(node)
        elif node.op_type in ("Div", "Mod"):
            if types.get(node.output[0]) not in FLOATS and not _is_positive(node.input[1], made):
                raise Fault("divides integers by what may be zero")
        elif node.op_type == "Loop":
            if not node.input[0] or not _counts_tokens(node.input[0], made):
                raise Fault("has a Loop that may not end")
        elif node.op_type == "Scan":
            bodies = [a.g for a in node.attribute if a.name == "body"]
            counts = [a.i for a in node.attribute if a.name == "num_scan_inputs"]
            sizes = {len(node.input), *(len(body.input) for body in bodies), *counts}
            if not bodies or not counts or len(sizes) > 1 or not all(node.input):
                raise Fault("has a Scan that does not hand each of its inputs over, row by row")
        elif node.op_type == "Slice":
            self._check_slice(node, made)
        elif node.op_type == "Range":
            start, delta = (_constant(made.get(name)) for name in node.input[0:3:2])
            whole = types.get(node.output[0]) not in FLOATS
            if whole and not ((start or 0) >= 0 and delta == 1 and _counts_tokens(node.input[1], made)):
                raise Fault("has a Range that may not end")

    def _check_attention(self, node: NodeProto) -> None:
        sizes = {a.name: a.i for a in node.attribute}
        heads, kv_heads = sizes.get("num_heads", 0), sizes.get("kv_num_heads", 0)
        if kv_heads != self._manifest.num_kv_heads or not heads or heads % kv_heads:
            raise Fault(
                f"has attention of {heads} heads over {kv_heads} of keys and values, and the manifest's are"
                f" {self._manifest.num_kv_heads}"
            )

    def _check_slice(self, node: NodeProto, made: Mapping[str, Any]) -> None:
        """Parts of heads are not empty: ONNX Runtime's RotaryEmbedding ends the process on such."""
        start, end, axis = (_constant(made.get(name)) for name in node.input[1:4])
        if axis is None:
            raise Fault("has a Slice along a dimension that is computed")
        if axis == 3 and (start is None or end is None or not 0 <= start < min(end, self._manifest.head_size)):
            raise Fault("has a Slice of heads with nothing in it")

    def _check_blocks(self, node: NodeProto) -> None:
        sizes = {a.name: a.i for a in node.attribute}
        if missing := [name for name in ("K", "N", "bits", "block_size") if name not in sizes]:
            raise Fault(f"has a MatMulNBits without {missing[0]}")
        block, blocks = sizes["block_size"], -(-sizes["K"] // sizes["block_size"])
        values, scales = (self._dims.get(name) for name in node.input[1:3])
        expected = [sizes["N"], blocks, block * sizes["bits"] // 8]
        if values is None or list(values) != expected or scales is None or math.prod(scales) != sizes["N"] * blocks:
            raise Fault(f"has a MatMulNBits whose weights are not {expected}")

    def _check_tensor(self, tensor: TensorProto) -> None:
        name = tensor.name
        if tensor.data_type not in _TYPES:
            raise Fault(f"has {name!r} in a type that no package has")
        itemsize, field = _TYPES[tensor.data_type]
        if not all(0 <= dim < 1 << 40 for dim in tensor.dims) or len(tensor.dims) > 8:
            raise Fault(f"has {name!r} in a shape that no tensor has")
        count = math.prod(tensor.dims)
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            self._check_place(tensor, count * itemsize, itemsize)
        elif tensor.HasField("raw_data"):
            if len(tensor.raw_data) != count * itemsize:
                raise Fault(f"has {name!r} with other values than its shape says")
        elif len(getattr(tensor, field)) != count:
            raise Fault(f"has {name!r} with other values than its shape says")
        elif itemsize < 4 and not all(0 <= value < 1 << 8 * itemsize for value in tensor.int32_data):
            raise Fault(f"has {name!r} with values out of range")
        if tensor.data_type in _INTEGERS and not tensor.external_data:
            for value in onnx.numpy_helper.to_array(tensor).reshape(-1).tolist():
                if abs(value) > self._largest and value not in _ENDS:
                    raise Fault(f"has {name!r} with values out of range")

    def _check_place(self, tensor: TensorProto, size: int, itemsize: int) -> None:
        """Raises Fault unless an external tensor lies in the package's weights file."""
        place: dict[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        location = self._manifest.weights
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if locations != [location] or tensor.data_location != TensorProto.EXTERNAL:
            where = ", ".join(map(repr, locations)) or "nowhere"
            raise Fault(f"reads {tensor.name} from {where} and not from the package's {location}")
        if len(place) != len(tensor.external_data) or set(place) != {"location", "offset", "length"}:
            raise Fault(f"says of {tensor.name!r} something else than where it is")
        offset, length = place["offset"], place["length"]
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in (offset, length)):
            raise Fault(f"has {tensor.name!r} at no place of the weights file")
        if int(length) != size or int(offset) + size > self._weights or int(offset) % itemsize:
            raise Fault(f"has {tensor.name!r} outside of the weights file")
        self._largest = max(self._largest, *tensor.dims, 0) if size else self._largest


def _fits(attribute: AttributeProto, expected: Attribute) -> bool:
    """Whether an attribute is of the expected kind and in its range."""
    if isinstance(expected, Subgraph):
        return bool(attribute.type == AttributeProto.GRAPH)
    if isinstance(expected, Scalar):
        tensor = attribute.t
        plain = tensor.data_type in _TYPES and not tensor.external_data and tensor.data_location == 0
        return attribute.type == AttributeProto.TENSOR and plain and list(tensor.dims) == [1]
    if isinstance(expected, Words):
        return attribute.type == AttributeProto.STRING and attribute.s in [word.encode() for word in expected.choices]
    if isinstance(expected, Floats):
        return attribute.type == AttributeProto.FLOAT and math.isfinite(attribute.f)
    if attribute.type == AttributeProto.INT:
        return expected.least <= attribute.i <= expected.most
    many = attribute.type == AttributeProto.INTS and len(attribute.ints) <= 8
    return many and all(expected.least <= value <= expected.most for value in attribute.ints)


# --- integers that come from sizes -----------------------------------------------------------------------------


def _constant(maker: Any) -> int | None:
    """The number in an inline tensor of one integer."""
    if not isinstance(maker, TensorProto) or maker.data_type not in _INTEGERS or maker.external_data:
        return None
    values = onnx.numpy_helper.to_array(maker).reshape(-1).tolist()
    return int(values[0]) if len(values) == 1 else None


def _is_positive(name: str, made: Mapping[str, Any], depth: int = 16) -> bool:
    """Whether a value is certain to have no number below one. False where that takes more than a few steps to see."""
    maker = made.get(name)
    if (number := _constant(maker)) is not None:
        return number > 0
    if not isinstance(maker, NodeProto) or not depth:
        return False
    if isinstance(maker, NodeProto) and maker.op_type == "Shape":
        return _counts_tokens(name, made)  # a prompt has tokens, and a batch has rows
    inputs = [_is_positive(i, made, depth - 1) for i in maker.input]
    if maker.op_type == "Max":
        return any(inputs)
    if maker.op_type == "Where":
        return all(inputs[1:])
    return maker.op_type in ("Mul", "Add", "Min", "Cast", "Squeeze", "Identity") and all(inputs[:2])


def _counts_tokens(name: str, made: Mapping[str, Any], depth: int = 16) -> bool:
    """Whether a value is certain to be no larger than a number of tokens, rows or slots."""
    maker = made.get(name)
    if (number := _constant(maker)) is not None:
        return number <= _STEPS
    if not isinstance(maker, NodeProto) or not depth:
        return False
    if maker.op_type == "Shape":
        return maker.input[0] in _COUNTED or maker.input[0].startswith("past_key_values.")
    if maker.op_type == "Size":
        return maker.input[0] == "attention_mask"
    counts = [_counts_tokens(i, made, depth - 1) for i in maker.input]
    if maker.op_type == "Div":
        return counts[0] and _is_positive(maker.input[1], made, depth - 1)
    if maker.op_type == "Sub":
        return _counts_difference(maker, counts, made, depth)
    if maker.op_type == "Where":
        return all(counts[1:])
    if maker.op_type == "Min":
        return any(counts)
    return maker.op_type in ("Squeeze", "Unsqueeze", "Identity", "Cast", "Max", "Add", "Gather") and all(counts[:2])


def _counts_difference(node: NodeProto, counts: Sequence[bool], made: Mapping[str, Any], depth: int) -> bool:
    """Of a Sub. What it takes away is a number of tokens as well; (begin + size) - begin is size wherever it begins."""
    ahead = made.get(node.input[0])
    if isinstance(ahead, NodeProto) and ahead.op_type == "Add" and ahead.input[0] == node.input[1]:
        return _counts_tokens(ahead.input[1], made, depth - 1)
    less = _constant(made.get(node.input[1]))
    return counts[0] and (less is None or less >= 0)
