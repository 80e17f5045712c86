"""Whether the values in a manifest are ones that a package can have, told before anything is made of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from popcompile.export.io_names import TEXT_INPUTS, input_names, output_names, token_names
from popcompile.export.precisions import PRECISIONS
from popcompile.export.providers import PROVIDERS
from popcompile.package.image_inputs import wrong_images

if TYPE_CHECKING:
    from popcompile.package.manifest import Manifest

#: least and most; no decoder comes near the upper ends, and what is computed from them stays far below 2**63
_RANGES = {
    "num_layers": (1, 10_000),
    "num_kv_heads": (1, 4096),
    "head_size": (1, 4096),
    "vocab_size": (1, 1 << 27),
    "context_length": (1, 1 << 31),
    "block_size": (0, 256),
    "window": (1, 1 << 31),
}
#: layout -> stages with a graph of their own
_STAGES = {"split": {"prefill", "decode"}, "unified": {"prefill"}}
_IMAGE_STAGES = {"vision", "embedding"}
#: beside those, in packages for transformers.js
_TEXT_STAGES = {"text_embedding"}
_CHOICES = {
    "kv_projection": ("calibrated", "layer"),
    "dtype": tuple(PRECISIONS),
    "provider": tuple(PROVIDERS),
    "layout": tuple(_STAGES),
}
_FILE_FIELDS = {"size", "sha256", "sample_sha256"}
_SHA256 = re.compile("[0-9a-f]{64}")
_FILES = 10_000
_CHARACTERS = 4096  # of a text


def wrong_value(manifest: Manifest) -> str:
    """What is wrong with the values of a manifest's fields, whose types are right, or ""."""
    for name, (least, most) in _RANGES.items():
        value = getattr(manifest, name)
        if not least <= value <= most:
            return f"field {name} is {value}, out of range ({least} to {most})"
    for name, choices in _CHOICES.items():
        if (value := getattr(manifest, name)) not in choices:
            return f"field {name} is {value[:80]!r}, none of {', '.join(choices)}"
    if (manifest.block_size > 0) != PRECISIONS[manifest.dtype].quantized:
        return f"field block_size is {manifest.block_size}, which does not go with dtype {manifest.dtype}"
    pruned, layers = manifest.pruned, manifest.num_layers
    if pruned != sorted(set(pruned)) or (pruned and not 0 <= pruned[0] <= pruned[-1] < layers):
        return f"field pruned is no ascending list of layers from 0 to {layers - 1}"
    if manifest.vision and (problem := wrong_images(manifest.vision, manifest.vocab_size)):
        return problem
    return _wrong_names(manifest) or _wrong_source(manifest.source) or _wrong_files(manifest)


def _wrong_names(manifest: Manifest) -> str:
    stages = _STAGES[manifest.layout] | (_IMAGE_STAGES if manifest.vision else set())
    more = _TEXT_STAGES if manifest.vision else set()
    if not stages <= set(manifest.graphs) <= stages | more:
        return (
            f"field graphs has other graphs than {' and '.join(sorted(stages))}, which the {manifest.layout} layout has"
        )
    images = manifest.images
    inputs = input_names(manifest.num_layers, token_names(images.axes) if images else TEXT_INPUTS)
    for name, expected in (("inputs", inputs), ("outputs", output_names(manifest.num_layers))):
        if getattr(manifest, name) != expected:
            return f"field {name} has other names than those of {manifest.num_layers} layers"
    return ""


def _wrong_source(source: dict[str, Any]) -> str:
    if not isinstance(source.get("name"), str):
        return "field source has no name"
    if wrong := [key for key, value in source.items() if not isinstance(value, str) or len(value) > _CHARACTERS]:
        return f"field source has a wrong value ({wrong[0][:80]!r})"
    return ""


def _wrong_files(manifest: Manifest) -> str:
    if len(manifest.files) > _FILES:
        return f"field files has more than {_FILES} files"
    for name, entry in manifest.files.items():
        hashes = [value for key, value in entry.items() if key != "size"]
        if not {"size", "sha256"} <= set(entry) <= _FILE_FIELDS:
            return f"field files has other fields of {name!r} than size and sha256"
        if type(entry["size"]) is not int or not 0 <= entry["size"] < 1 << 50:
            return f"field files has a wrong size of {name!r}"
        if not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in hashes):
            return f"field files has a wrong hash of {name!r}"
    used = [*manifest.graphs.values(), manifest.weights]
    if len(set(used)) < len(used):
        return "fields graphs and weights name one file twice"
    if empty := [name for name in used if name in manifest.files and not manifest.files[name]["size"]]:
        return f"field files has an empty {empty[0]}"
    return ""
