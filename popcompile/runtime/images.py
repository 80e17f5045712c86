"""Images through a package's vision graph: one call for each size that images have, and their features in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from popcompile.errors import PopcompileError

Array = np.ndarray[Any, Any]

#: of a call's images together, at most, unless a single one has more: what is held at a time grows with them
PATCHES = 16_384


class Session(Protocol):
    """The vision graph, ready to run: ONNX Runtime's InferenceSession."""

    def run(self, outputs: None, inputs: dict[str, Array], /) -> Sequence[Any]: ...


def encode_images(session: Session, pixel_values: Array) -> Array:
    """image_features [images * tokens, W] of images of one fixed size, pixel_values [images, 3, S, S]."""
    return np.asarray(session.run(None, {"pixel_values": np.asarray(pixel_values, np.float32)})[0])


def encode_grids(session: Session, pixel_values: Array, grids: Array, merge: int, *, most: int = PATCHES) -> Array:
    """image_features [tokens, W] of images or videos of any sizes, in the order in which they are given.

    pixel_values [patches, features]: of all images, one after another. grids [images, 3]: frames, rows and columns of
    each, in patches. merge: patches along each side of a token. most: patches of a call, as PATCHES. The vision graph
    takes images of one size at a time, and there are as many calls as sizes, or more.

    Raises PopcompileError where grids are none, or where they and the patches do not fit.
    """
    sizes = _checked(np.asarray(grids), len(pixel_values), merge)
    counts = sizes.prod(axis=1)
    ends = np.cumsum(counts)
    found: dict[int, Array] = {}
    for images in _calls(sizes, counts, most):
        patches = np.concatenate([pixel_values[ends[i] - counts[i] : ends[i]] for i in images])
        inputs = {"pixel_values": patches.astype(np.float32, copy=False), "image_grid_thw": sizes[images]}
        (features,) = session.run(None, inputs)
        tokens = np.cumsum(counts[images] // merge**2)
        found |= zip(images, np.split(features, tokens[:-1]), strict=True)
    return np.concatenate([found[i] for i in range(len(sizes))])


def _checked(grids: Array, patches: int, merge: int) -> Array:
    """The grids, [images, 3] int64."""
    if grids.ndim != 2 or grids.shape[1:] != (3,) or not len(grids) or not np.issubdtype(grids.dtype, np.integer):
        raise PopcompileError(f"image_grid_thw has shape {list(grids.shape)}; give [images, 3] of whole numbers")
    if (grids < 1).any() or (grids[:, 1:] % merge).any():
        raise PopcompileError(
            f"image_grid_thw has {grids.tolist()}; give frames, and rows and columns that {merge} divides"
        )
    expected = int(grids.astype(np.int64).prod(axis=1).sum())
    if expected != patches:
        raise PopcompileError(
            f"pixel_values has {patches} patches and image_grid_thw {expected}; give both as one processor made them"
        )
    return grids.astype(np.int64)


def _calls(sizes: Array, counts: Array, most: int) -> Iterator[Sequence[int]]:
    """Images of one height and width, that go through the graph at once."""
    for size in dict.fromkeys((int(rows), int(columns)) for _, rows, columns in sizes):
        call: list[int] = []
        for image in np.flatnonzero((sizes[:, 1:] == size).all(axis=1)).tolist():
            if call and counts[[*call, image]].sum() > most:
                yield call
                call = []
            call.append(image)
        yield call
