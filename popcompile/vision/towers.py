"""The vision towers of the families that are supported, over transformers' modules, as they are traced.

Of Qwen3-VL, whose attention has to tell images apart, transformers' modules are called one by one, by the names that
checkpoints give them, and their forward methods are not. Gemma-3's tower is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from popcompile.errors import PopcompileError
from popcompile.passes import ops
from popcompile.upstream import attention_implementation
from popcompile.vision.patches import Patches

#: what transformers knows `_attention` as
_IMPLEMENTATION = "popcompile_images"


class Qwen3VLTower(nn.Module):
    """Patches of images of one size -> features of their tokens, each with its D DeepStack features behind it.

    pixel_values [patches, 3 * 2 * p * p] fp32, image_grid_thw [images, 3] -> image_features [tokens, (1 + D) * H].
    Grids are alike in all but the number of frames, and patches are those of all frames of all images.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.model.visual

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        visual = self.visual
        patches = Patches(image_grid_thw, pixel_values.shape[0], visual.spatial_merge_size)
        projection = visual.patch_embed.proj  # a convolution whose kernel is a whole patch
        x = F.linear(pixel_values.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
        x = x + patches.interpolated(visual.pos_embed.weight).to(x.dtype)
        angles = patches.angles(visual.rotary_pos_emb.inv_freq)
        tables = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        deep = []
        for layer, block in enumerate(visual.blocks):
            x = x + _attend(block.attn, block.norm1(x), *tables, patches.per_frame)
            x = x + block.mlp(block.norm2(x))
            if layer in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(layer)]
                deep.append(merger(x))
        return torch.cat([visual.merger(x), *deep], dim=-1)


def _attend(module: Any, x: Tensor, cos: Tensor, sin: Tensor, length: Tensor) -> Tensor:
    """Qwen3-VL's attention of patches x [N, hidden] within each `length` of them; cos, sin [N, D / 2]."""
    query, key, value = (part.view(part.shape[0], module.num_heads, -1) for part in module.qkv(x).chunk(3, dim=-1))
    query, key = ops.rotate_tokens(query, cos, sin), ops.rotate_tokens(key, cos, sin)
    out = ops.packed_attention(query, key, value, length, query.shape[-1] ** -0.5)
    attended: Tensor = module.proj(out.flatten(1))
    return attended


class Gemma3Tower(nn.Module):
    """Images of one fixed size -> features of their tokens, and a 1 behind each: rows of text end in 0.

    pixel_values [images, 3, S, S] fp32 -> image_features [images * tokens, H + 1].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        with attention_implementation(self.tower, _IMPLEMENTATION):
            x = self.tower(pixel_values=pixel_values.to(self.tower.dtype)).last_hidden_state
        return F.pad(self.projector(x).flatten(0, 1), (0, 1), value=1.0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [images, H, S, D] -> [images, S, H, D]."""
    if attention_mask is not None or is_causal:
        raise PopcompileError(f"{type(module).__name__} attends with a mask, which vision towers have none of here")
    images, _heads, length, size = query.shape
    packed = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    scale = size**-0.5 if scaling is None else scaling
    out = ops.packed_attention(*packed, torch.full((), length, dtype=torch.int64), scale)
    return out.view(images, length, -1, size), None


AttentionInterface.register(_IMPLEMENTATION, _attention)


class Input(NamedTuple):
    """shape: of an example. free: axis -> the name of a size, and how many times that the axis is as long."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    free: Mapping[int, tuple[str, int]]


def _qwen3_vl_inputs(config: Any) -> dict[str, Input]:
    vision = config.vision_config
    merged = vision.spatial_merge_size**2
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": Input((12 * merged, features), torch.float32, {0: ("num_image_tokens", merged)}),
        "image_grid_thw": Input((2, 3), torch.int64, {0: ("num_images", 1)}),
    }


def _gemma3_inputs(config: Any) -> dict[str, Input]:
    side = config.vision_config.image_size
    return {"pixel_values": Input((2, 3, side, side), torch.float32, {0: ("num_images", 1)})}


@dataclass(frozen=True)
class VisionFamily:
    """What differs between families, each made of the config, or of the whole model.

    tower: the module that is traced. inputs: of it, by name. more_columns: how many image features have beside the
    decoder's H. image_tokens: kind -> id of the tokens that images' and videos' features take the place of.
    merge: patches along each side of a token, 0 where images have one size. tokens_per_image: 0 where they have not.
    """

    tower: Callable[[PreTrainedModel], nn.Module]
    inputs: Callable[[Any], dict[str, Input]]
    more_columns: Callable[[Any], int]
    image_tokens: Callable[[Any], dict[str, int]]
    merge: Callable[[Any], int] = lambda config: 0
    tokens_per_image: Callable[[Any], int] = lambda config: 0


#: by model_type
FAMILIES: Mapping[str, VisionFamily] = {
    "qwen3_vl": VisionFamily(
        Qwen3VLTower,
        _qwen3_vl_inputs,
        lambda config: len(config.vision_config.deepstack_visual_indexes) * config.text_config.hidden_size,
        lambda config: {"image": config.image_token_id, "video": config.video_token_id},
        merge=lambda config: config.vision_config.spatial_merge_size,
    ),
    "gemma3": VisionFamily(
        Gemma3Tower,
        _gemma3_inputs,
        lambda config: 1,
        lambda config: {"image": config.image_token_id},
        tokens_per_image=lambda config: config.mm_tokens_per_image,
    ),
}


def vision_family(config: PretrainedConfig) -> VisionFamily:
    """Raises PopcompileError for a model whose vision tower is not supported."""
    if config.model_type not in FAMILIES:
        raise PopcompileError(
            f"{config.model_type}: popcompile supports the vision towers of {', '.join(FAMILIES)}, and no others"
        )
    return FAMILIES[config.model_type]


def embedding_width(config: PretrainedConfig) -> int:
    """Columns of inputs_embeds and image_features: H, and what images bring beside it."""
    return int(config.get_text_config().hidden_size) + vision_family(config).more_columns(config)
