"""What onnxruntime-genai needs beside a decoder to take pictures: sections of genai_config.json, genai_processor.json.

genai chooses its code by the model's type, and two of its types take the graphs that packages have. What the vision
graph is given tells which:

    pixel_values, image_grid_thw    qwen3_vl: a call for each image where sizes differ, position_ids [3, B, S]
    pixel_values                    gemma3: images of one size; positions are slots of the cache. Its processor says 256
                                    tokens for any number of pictures: with several, set num_image_tokens

Embeddings and features have the columns that decoder.hidden_size says, which genai reads for nothing else: DeepStack's
features, or the mark of an image, go through it unseen.

genai_processor.json lists the operations that make pixels of a picture file, in onnxruntime-extensions' format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .io_names import IMAGE_OUTPUTS

#: the file that genai's own processor of pictures is made of
PROCESSOR = "genai_processor.json"


class Images(Protocol):
    """What the graphs take of images, as the package's manifest says it.

    tokens: kind -> id. inputs: of the vision graph. width: columns of embeddings. merge: patches along each side of a
    token, or 0. axes: of position_ids, or 0.
    """

    @property
    def tokens(self) -> Mapping[str, int]: ...
    @property
    def inputs(self) -> list[str]: ...
    @property
    def width(self) -> int: ...
    @property
    def merge(self) -> int: ...
    @property
    def axes(self) -> int: ...


#: what an image processor is configured by, defaults included, by the names of transformers' fields
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class _Type:
    """name: genai's. size: the fields of an image processor's `size`. resize: attributes of Resize.

    layout: what is done to the resized pixels [rows, columns, 3] at last.
    """

    name: str
    size: tuple[str, str]
    resize: Callable[[Settings], dict[str, Any]]
    layout: Callable[[Settings], dict[str, Any]]


def _smart_resize(settings: Settings) -> dict[str, Any]:
    size = settings["size"]
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {"smart_resize": 1, **pixels, "patch_size": settings["patch_size"], "merge_size": settings["merge_size"]}


def _fixed_size(settings: Settings) -> dict[str, Any]:
    return {"height": settings["size"]["height"], "width": settings["size"]["width"], "keep_aspect_ratio": 0}


def _patches(settings: Settings) -> dict[str, Any]:
    """To [patches, features], in blocks of those that are one token."""
    sizes = ("patch_size", "temporal_patch_size", "merge_size")
    return _operation("PatchImage", **{name: settings[name] for name in sizes})


def _channels_first(_: Settings) -> dict[str, Any]:
    return _operation("Permute3D", dims=[2, 0, 1])


#: by the vision graph's inputs
_TYPES = {
    ("pixel_values", "image_grid_thw"): _Type("qwen3_vl", ("shortest_edge", "longest_edge"), _smart_resize, _patches),
    ("pixel_values",): _Type("gemma3", ("height", "width"), _fixed_size, _channels_first),
}

#: by PIL's number of a filter
_INTERPOLATIONS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
#: fields that have a number for each colour
_COLOURS = ("image_mean", "image_std")


def image_sections(config: Any, images: Images, graphs: Mapping[str, str]) -> dict[str, Any]:
    """Fields of genai_config.json's `model` that the model's images bring. config: of the whole model."""
    tokens = {f"{kind}_token_id": token for kind, token in images.tokens.items()}
    if images.axes:  # an image is found by the mark before it, and its rows and columns are counted
        tokens["vision_start_token_id"] = config.vision_start_token_id
    return {
        "type": _TYPES[tuple(images.inputs)].name,
        **tokens,
        "embedding": {
            "filename": graphs["embedding"],
            "inputs": {name: name for name in ("input_ids", *IMAGE_OUTPUTS["vision"])},
            "outputs": {name: name for name in IMAGE_OUTPUTS["embedding"]},
        },
        "vision": {
            "filename": graphs["vision"],
            "config_filename": PROCESSOR,
            **({"spatial_merge_size": images.merge} if images.merge else {}),
            "inputs": {name: name for name in images.inputs},
            "outputs": {name: name for name in IMAGE_OUTPUTS["vision"]},
        },
    }


def genai_processor(settings: Settings, images: Images) -> dict[str, Any] | None:
    """The contents of genai_processor.json; None where genai has no operation for what an image processor does."""
    kind = _TYPES[tuple(images.inputs)]
    if not _is_known(settings, kind):
        return None
    operations = [_operation("DecodeImage", color_space="RGB")]
    if settings["do_resize"]:
        interpolation = _INTERPOLATIONS[settings["resample"]]
        operations.append(_operation("Resize", interpolation=interpolation, **kind.resize(settings)))
    scale = settings["rescale_factor"] if settings["do_rescale"] else 1
    operations.append(_operation("Rescale", rescale_factor=float(scale)))  # which makes floats of bytes
    if settings["do_normalize"]:
        means, deviations = ([float(x) for x in settings[name]] for name in _COLOURS)
        operations.append(_operation("Normalize", mean=means, std=deviations))
    return {"processor": {"name": "image_processor", "transforms": [*operations, kind.layout(settings)]}}


def _is_known(settings: Settings, kind: _Type) -> bool:
    """Whether genai has an operation for each step, and the settings say how."""
    colours = [settings.get(name) for name in _COLOURS]
    return (
        settings.get("resample") in _INTERPOLATIONS
        and set(kind.size) <= set(settings.get("size") or ())
        and all(isinstance(colour, list) and len(colour) == 3 for colour in colours)
        and settings.get("rescale_factor") is not None
        and not settings.get("do_pan_and_scan")  # which cuts more images out of one
    )


def _operation(kind: str, **attributes: Any) -> dict[str, Any]:
    return {"operation": {"name": kind, "type": kind, "attrs": attributes}}
