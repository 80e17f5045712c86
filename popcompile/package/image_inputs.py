"""What the graphs of a vision-language model's package take of images, as its manifest says it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

#: kinds of what is seen, by the processors' names of its pixels and of its grids: both go through one vision graph
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}

#: least and most
_RANGES = {"width": (1, 1 << 24), "merge": (0, 64), "tokens_per_image": (0, 1 << 16), "axes": (0, 8)}


@dataclass(frozen=True)
class ImageInputs:
    """tokens: kind -> id of the tokens whose places features of images take.

    inputs: of the vision graph, in order. width: columns of the features and of the decoder's embeddings.
    merge: patches along each side of a token, where an image's grid says how many tokens it has; else 0.
    tokens_per_image: of images of one size; 0 where grids say.
    axes: of position_ids, which count rows and columns of images (M-RoPE); 0 where positions are slots of the cache.
    """

    tokens: dict[str, int]
    inputs: list[str]
    width: int
    merge: int
    tokens_per_image: int
    axes: int


def wrong_images(data: dict[str, Any], vocab_size: int) -> str:
    """What is wrong with the fields that a manifest has of ImageInputs, or ""."""
    if set(data) != {field.name for field in fields(ImageInputs)}:
        return "field vision has other fields than those of images"
    for name, (least, most) in _RANGES.items():
        value = data[name]
        if type(value) is not int or not least <= value <= most:
            return f"field vision has a wrong {name}"
    tokens, inputs = data["tokens"], data["inputs"]
    if not isinstance(tokens, dict) or not tokens or not set(tokens) <= set(PIXELS):
        return "field vision has tokens of other kinds than image and video"
    if not all(type(token) is int and 0 <= token < vocab_size + (1 << 20) for token in tokens.values()):
        return "field vision has tokens that are none"
    if inputs not in ([PIXELS["image"]], [PIXELS["image"], GRIDS["image"]]):
        return "field vision has other inputs than those of images"
    sizes = (data["merge"] > 0, data["tokens_per_image"] > 0)
    if sizes != (len(inputs) == 2, len(inputs) == 1):
        return "field vision does not say how many tokens an image has"
    return ""
