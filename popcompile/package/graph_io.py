"""Check the inputs and outputs of a package's graphs: names, types and shapes are those that the manifest says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from onnx import GraphProto, TensorProto

from popcompile.export.io_names import IMAGE_OUTPUTS
from popcompile.package.image_inputs import ImageInputs
from popcompile.package.manifest import Manifest

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INT64 = (TensorProto.INT64,)
#: of a patch, and of an image of a fixed size with its three colours, at most
_FEATURES, _PIXELS = 1 << 16, 3 << 24


class Fault(Exception):
    """What is wrong with a graph."""


def check_io(graph: GraphProto, manifest: Manifest, stage: str) -> None:
    """Raise Fault where a stage's graph has others than its manifest's stage has."""
    images = manifest.images
    if images is not None and stage in IMAGE_OUTPUTS:
        _check_images(graph, images, stage)
    else:
        _check_decoder(graph, manifest, stage)


def _check_decoder(graph: GraphProto, manifest: Manifest, stage: str) -> None:
    _check_names(graph, manifest.inputs, manifest.outputs)
    count = len(manifest.inputs) - 2 * manifest.num_layers
    tokens, (logits, *present) = graph.input[:count], graph.output
    caches = [*graph.input[count:], *present]
    kinds = {_kind(value) for value in caches}
    if len(kinds) != 1 or not kinds <= set(FLOATS) or _kind(logits) not in kinds | {TensorProto.FLOAT}:
        raise Fault("has a cache or logits in a type that no package has")
    images = manifest.images
    expected: dict[str, tuple[Iterable[int], list[int], str]] = {
        "input_ids": (_INT64, [0, 0], "[batch, tokens] of int64"),
        "attention_mask": (_INT64, [0, 0], "[batch, tokens] of int64"),
    }
    if images is not None:
        expected["inputs_embeds"] = (
            kinds,
            [0, 0, images.width],
            f"[batch, tokens, {images.width}] of the cache's type",
        )
        expected["position_ids"] = (_INT64, [images.axes, 0, 0], f"[{images.axes}, batch, tokens] of int64")
    for value in tokens:
        _check_value(value, *expected[value.name])
    heads, size = manifest.num_kv_heads, manifest.head_size
    for value in caches:
        _check_value(value, kinds, [0, heads, 0, size], f"[batch, {heads}, tokens, {size}]")
    if _dims(logits) not in ([0, 1, manifest.vocab_size], [0, 0, manifest.vocab_size]):
        raise Fault(f"has logits that are not [batch, tokens, {manifest.vocab_size}]")
    if (_dims(logits)[1] == 1) != (stage == "prefill"):
        raise Fault("has logits of one token, which are for prefill, or of all, which are for decode")


def _check_images(graph: GraphProto, images: ImageInputs, stage: str) -> None:
    """Of the graphs that make embeddings of tokens and images."""
    embedded = {"embedding": ["input_ids", "image_features"], "text_embedding": ["input_ids"]}
    _check_names(graph, embedded.get(stage, images.inputs), IMAGE_OUTPUTS[stage])
    width = images.width
    for value in (*graph.input, *graph.output):
        if value.name == "image_features":
            _check_value(value, FLOATS, [0, width], f"[tokens, {width}]")
        elif value.name == "inputs_embeds":
            _check_value(value, FLOATS, [0, 0, width], f"[batch, tokens, {width}]")
        elif value.name == "input_ids":
            _check_value(value, _INT64, [0, 0], "[batch, tokens] of int64")
        elif value.name == "image_grid_thw":
            _check_value(value, _INT64, [0, 3], "[images, 3] of int64")
        elif _kind(value) != TensorProto.FLOAT or not _are_pixels(_dims(value), images):
            raise Fault("has pixel_values that no processor makes")


def _are_pixels(dims: list[int], images: ImageInputs) -> bool:
    """Whether these are [patches, features] or [images, 3, S, S]: free, and of a size that a patch or an image has."""
    most, rank = (_FEATURES, 2) if images.merge else (_PIXELS, 4)
    return len(dims) == rank and dims[0] == 0 and 0 < math.prod(dims[1:]) <= most


def _check_names(graph: GraphProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if [v.name for v in graph.input] != list(inputs) or [v.name for v in graph.output] != list(outputs):
        raise Fault("has other inputs or outputs than the manifest")


def _check_value(value: Any, kinds: Iterable[int], dims: list[int], words: str) -> None:
    """dims: 0 for those that are free."""
    if _kind(value) not in kinds or _dims(value) != dims:
        raise Fault(f"has a {value.name} that is not {words}")


def _kind(value: Any) -> int:
    return int(value.type.tensor_type.elem_type)


def _dims(value: Any) -> list[int]:
    """0 for those that are not fixed."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
