"""The images that a benchmark's prompts begin with: only their sizes matter, in tokens, for times do not depend on what
is to be seen. Every subject makes its own of noise (runtime/noise.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from popcompile.bench.subjects import Subject
from popcompile.errors import PopcompileError
from popcompile.loading import one_line, quiet
from popcompile.package.configs import load_processor
from popcompile.package.image_inputs import GRIDS, ImageInputs
from popcompile.package.manifest import Manifest
from popcompile.runtime.pictures import read_picture

#: rows and columns of an image, in tokens
Size = tuple[int, int]


def image_sizes(folder: Path, manifest: Manifest, files: Sequence[str], tokens: Iterable[int]) -> list[Size]:
    """Sizes of images as the package's processor makes them of picture files, and then of images of so many tokens.

    Raises PopcompileError where the model takes no such images.
    """
    if not files and not tokens:
        return []
    inputs = manifest.images
    if inputs is None:
        raise PopcompileError(
            f"{folder}: {manifest.model_type} takes no images, or was converted with --text-only; leave --image and"
            " --image-tokens out"
        )
    return [*_of_files(folder, manifest, inputs, files), *(_of_tokens(inputs, count) for count in tokens)]


def _of_files(folder: Path, manifest: Manifest, inputs: ImageInputs, files: Sequence[str]) -> list[Size]:
    if not files:
        return []
    pictures = [read_picture(file) for file in files]
    processor = load_processor(folder, manifest)
    try:
        with quiet():
            pixels = processor.image_processor(images=pictures, return_tensors="pt")
    except Exception as error:  # processors raise anything
        raise PopcompileError(
            f"{folder}: its processor refuses the pictures ({one_line(error)}); give other pictures"
        ) from error
    if not inputs.merge:
        return [(1, inputs.tokens_per_image)] * len(files)
    return [(rows // inputs.merge, columns // inputs.merge) for _, rows, columns in pixels[GRIDS["image"]].tolist()]


def _of_tokens(inputs: ImageInputs, tokens: int) -> Size:
    """Of images of any size, the one nearest to a square."""
    if inputs.merge:
        rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
        return rows, tokens // rows
    if tokens != inputs.tokens_per_image:
        raise PopcompileError(
            f"--image-tokens {tokens}: all images of this model have {inputs.tokens_per_image} tokens; give that"
        )
    return 1, tokens


def require_images(subjects: Sequence[Subject]) -> None:
    """Raise PopcompileError for one that cannot be given the images of the first."""
    for subject in subjects:
        if subject.kind not in ("package", "transformers"):
            raise PopcompileError(
                f"{subject.path}: bench gives images to packages in popcompile's own runtime and to checkpoints alone;"
                " leave --image and --image-tokens out"
            )
        expected, taken = subjects[0].images, subject.images
        if expected is None or taken is None or taken.tokens_per_image != expected.tokens_per_image:
            raise PopcompileError(f"--against {subject.path}: takes no images of these sizes; leave it out")
