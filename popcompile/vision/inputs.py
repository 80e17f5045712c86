"""What the graphs of a vision-language model take of images, read from its config and its traced graphs."""

from __future__ import annotations

from transformers import PretrainedConfig

from popcompile.package.image_inputs import ImageInputs
from popcompile.passes.base import Program
from popcompile.passes.graph import inputs_of, position_ids_of, shape_of
from popcompile.vision.towers import embedding_width, vision_family


def image_inputs(config: PretrainedConfig, program: Program) -> ImageInputs:
    """program: with a graph "vision", before or behind the split of the decoder's."""
    family = vision_family(config)
    positions = position_ids_of(program.graphs["model" if "model" in program.graphs else "prefill"])
    return ImageInputs(
        tokens=family.image_tokens(config),
        inputs=list(inputs_of(program.graphs["vision"])),
        width=embedding_width(config),
        merge=family.merge(config),
        tokens_per_image=family.tokens_per_image(config),
        axes=0 if positions is None else int(shape_of(positions)[0]),
    )


def token_side(config: PretrainedConfig) -> int:
    """Pixels along each side of what becomes one token."""
    family, vision = vision_family(config), config.vision_config
    if merge := family.merge(config):
        return int(vision.patch_size * merge)
    return int(vision.image_size / family.tokens_per_image(config) ** 0.5)
