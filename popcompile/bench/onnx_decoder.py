"""Decoders of other tools: one ONNX graph whose cache comes in and goes out, as `bench` compares with.

    input_ids [batch, tokens], attention_mask [batch, past + tokens], position_ids [batch, tokens],
    past_key_values.N.key, past_key_values.N.value [batch, kv_heads, past, head_size]
        -> logits [batch, tokens or 1, vocabulary], present.N.key, present.N.value [batch, kv_heads, past + tokens, ...]

onnxruntime-genai's model builder, mobius and optimum write such graphs. genai_config.json, where there is one, may give
other names; what the graph leaves open stands there or in the checkpoint's config.json, which may stand above onnx/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from popcompile.errors import PopcompileError
from popcompile.files import read_regular
from popcompile.loading import read_json

GENAI_CONFIG = "genai_config.json"
_CONFIG = "config.json"
_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
_KINDS = ("key", "value")
_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
}
_LARGEST = 2 << 30  # bytes of an ONNX file, by protobuf
LOOKED_FOR = (
    "looked for input_ids, past_key_values.N.key and .value, logits, present.N.key and .value, or what a"
    f" {GENAI_CONFIG} beside the graph calls them"
)


@dataclass(frozen=True)
class OnnxDecoder:
    """How to call a graph. Lengths are in tokens.

    ids: input_ids. mask, positions: the inputs that count slots and positions, None where the graph has none.
    past, present: keys and values of every layer, in one order. cache_shapes: [kv_heads, head_size] of each of them.
    windows: of each, 0, or how many slots it has from the start to the end (sliding_window_cache).
    in_place: a step may write into the cache's buffers, for genai_config.json says that past and present may share one,
    or every layer's attention is a GroupQueryAttention, which takes that. context_length: None where nothing says it.
    """

    graph: str
    ids: str
    mask: str | None
    positions: str | None
    logits: str
    past: list[str]
    present: list[str]
    cache_shapes: list[list[int]]
    windows: list[int]
    cache_dtype: str
    ids_dtype: str
    in_place: bool
    vocab_size: int
    context_length: int | None


def read_decoder(path: Path) -> OnnxDecoder:
    """What the ONNX file at `path`, and the configs beside it, say of its inputs and outputs.

    Raises PopcompileError for a graph that is no such decoder.
    """
    try:
        graph = onnx.load_from_string(read_regular(path, _LARGEST)).graph
    except OSError as error:
        raise PopcompileError(f"{path}: cannot be read ({error.strerror}); give another") from error
    except Exception as error:
        raise PopcompileError(f"{path}: not a readable ONNX file; give another, or build it again") from error
    facts = _Facts(path)
    inputs, outputs = ({v.name: v for v in values} for values in (graph.input, graph.output))
    for tensor in graph.initializer:  # which old exporters list among the inputs
        inputs.pop(tensor.name, None)
    optional = facts.name("attention_mask"), facts.name("position_ids")
    ids, logits = facts.name("input_ids"), facts.name("logits")
    for kind, name, there in (("input", ids, inputs), ("output", logits, outputs)):
        if name not in there:
            raise _no_decoder(path, f"it has no {kind} {name}")
    past, present = _cache_names(path, facts, inputs, outputs)
    if unknown := sorted(set(inputs) - {ids, *past, *optional}):
        raise _no_decoder(path, f"it has an input {unknown[0]}, which bench cannot give")
    dtypes = {_dtype(path, inputs[name]) for name in past}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float16"}:
        raise _no_decoder(path, "its cache is neither in float32 nor in float16")
    mask, positions = (name if name in inputs else None for name in optional)
    windows = _windows(graph)
    return OnnxDecoder(
        graph=str(path),
        ids=ids,
        mask=mask,
        positions=positions,
        logits=logits,
        past=past,
        present=present,
        cache_shapes=[_cache_shape(path, inputs[name], facts) for name in past],
        windows=[windows.get(name, 0) for name in past],
        cache_dtype=dtypes.pop(),
        ids_dtype=_dtype(path, inputs[ids]),
        in_place=mask is not None and (facts.shares_buffer or _takes_one_buffer(graph, past, present)),
        vocab_size=_dimensions(outputs[logits])[-1] or facts.require("vocab_size"),
        context_length=facts.number("context_length"),
    )


# --- what stands beside the graph ------------------------------------------------------------------------------


class _Facts:
    """Names and sizes that genai_config.json gives, or else the checkpoint's config.json."""

    def __init__(self, path: Path) -> None:
        self._path = path
        genai = _read(path.with_name(GENAI_CONFIG))
        model = _section(genai, "model")
        self.shares_buffer = _section(genai, "search").get("past_present_share_buffer") is True
        decoder = _section(model, "decoder")
        self._names = _INPUTS | _OUTPUTS | _section(decoder, "inputs") | _section(decoder, "outputs")
        config = _read((path.parent.parent if path.parent.name == "onnx" else path.parent) / _CONFIG)
        heads, hidden = config.get("num_attention_heads", 0), config.get("hidden_size", 0)
        by_heads = hidden // heads if _is_size(heads) and _is_size(hidden) else None
        candidates = {
            "vocab_size": (model.get("vocab_size"), config.get("vocab_size")),
            "context_length": (model.get("context_length"), config.get("max_position_embeddings")),
            "head_size": (decoder.get("head_size"), config.get("head_dim"), by_heads),
            "kv_heads": (decoder.get("num_key_value_heads"), config.get("num_key_value_heads"), heads),
        }
        self._numbers = {name: next(filter(_is_size, values), None) for name, values in candidates.items()}

    def name(self, what: str) -> str:
        name = self._names[what]
        if not isinstance(name, str) or (what.endswith("_names") and name.count("%d") != 1):
            raise PopcompileError(f"{self._path.with_name(GENAI_CONFIG)}: {what} is not a name; fix or remove the file")
        return name

    def number(self, what: str) -> int | None:
        return self._numbers[what]

    def require(self, what: str) -> int:
        if (number := self.number(what)) is None:
            raise _no_decoder(
                self._path, f"its {what} stands neither in the graph nor in a {GENAI_CONFIG} or {_CONFIG} beside it"
            )
        return number


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _read(path: Path) -> dict[str, Any]:
    return read_json(str(path.parent), path) if path.is_file() else {}


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


# --- the graph -------------------------------------------------------------------------------------------------


def _no_decoder(path: Path, reason: str) -> PopcompileError:
    return PopcompileError(f"{path}: no decoder that bench can run: {reason}; {LOOKED_FOR}")


def _cache_names(
    path: Path, facts: _Facts, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """The cache's inputs and outputs, key and value of the lowest layer first."""
    past, present = [], []
    patterns = {kind: (facts.name(f"past_{kind}_names"), facts.name(f"present_{kind}_names")) for kind in _KINDS}
    layers = [_layers(pattern, inputs) for pattern, _ in patterns.values()]
    if layers[0] != layers[1] or not layers[0]:
        expected = " and ".join(pattern.replace("%d", "N") for pattern, _ in patterns.values())
        raise _no_decoder(path, f"it has no inputs {expected}" + (" of the same layers" if any(layers) else ""))
    for layer in layers[0]:
        for incoming, outgoing in patterns.values():
            past.append(incoming.replace("%d", str(layer)))
            present.append(outgoing.replace("%d", str(layer)))
    if missing := [name for name in present if name not in outputs]:
        raise _no_decoder(path, f"it has no output {missing[0]}")
    return past, present


def _layers(pattern: str, names: Mapping[str, Any]) -> list[int]:
    """The numbers that stand for %d in names."""
    expression = re.compile(re.escape(pattern).replace("%d", r"(\d+)"))
    return sorted(int(found[1]) for name in names if (found := expression.fullmatch(name)))


def _dimensions(value: Any) -> list[int]:
    """0 for those that are not fixed."""
    return [d.dim_value if 0 < d.dim_value < 1 << 31 else 0 for d in value.type.tensor_type.shape.dim] or [0]


def _dtype(path: Path, value: Any) -> str:
    try:
        return _DTYPES[value.type.tensor_type.elem_type]
    except KeyError:
        raise _no_decoder(path, f"its input {value.name} has a type that bench does not know") from None


def _cache_shape(path: Path, value: Any, facts: _Facts) -> list[int]:
    shape = _dimensions(value)
    if len(shape) != 4:
        raise _no_decoder(path, f"its {value.name} is not [batch, kv_heads, past, head_size]")
    if shape[2]:
        raise _no_decoder(path, f"its cache has a fixed length of {shape[2]} tokens")
    return [shape[1] or facts.require("kv_heads"), shape[3] or facts.require("head_size")]


def _is_attention(node: onnx.NodeProto) -> bool:
    return node.op_type == "GroupQueryAttention" and node.domain == "com.microsoft"


def _windows(graph: onnx.GraphProto) -> dict[str, int]:
    """Slots of the caches that hold a window of the tokens, by the name of the past."""
    found: dict[str, int] = {}
    for node in filter(_is_attention, graph.node):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if attributes.get("sliding_window_cache"):
            found |= dict.fromkeys(node.input[3:5], attributes.get("local_window_size", 0))
    return found


def _takes_one_buffer(graph: onnx.GraphProto, past: list[str], present: list[str]) -> bool:
    """Whether nothing but GroupQueryAttention sees how long a past is: the others count by the mask."""
    layers = {(*past[i : i + 2], *present[i : i + 2]) for i in range(0, len(past), 2)}
    for node in graph.node:
        if _is_attention(node) and (caches := (*node.input[3:5], *node.output[1:3])) in layers:
            layers.remove(caches)
        elif set(past) & set(node.input):
            return False
    return not layers
