"""What a model's attention sees is what transformers' masking functions say, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from bad_input import refusal
from conftest import tiny_gemma3, tiny_llama
from image_attention_reference import gemma3
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from popcompile.frontend.masks import Mask, Rule, causal_mask, image_masks
from popcompile.frontend.tracing import trace
from popcompile.passes import ops
from popcompile.passes.graph import find


@pytest.mark.parametrize("window", [1, 2, 8, 255, 256, 4096, 100_000])
def test_windows(window: int) -> None:
    mask = causal_mask(mask_function=sliding_window_causal_mask_function(window), config=tiny_llama())
    assert mask.window == window


def test_causal() -> None:
    assert causal_mask(mask_function=causal_mask_function, config=tiny_llama()).window == 0


OTHER: dict[str, Rule] = {
    "bidirectional": bidirectional_mask_function,
    "a window to both sides": sliding_window_bidirectional_mask_function(8),
    "chunks": chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)),
    "chunks that divide the probe": chunked_causal_mask_function(1 << 19, torch.zeros(1, dtype=torch.int64)),
    "a prefix in both directions": or_masks(causal_mask_function, lambda b, h, q, k: (q < 4) & (k < 4)),
    "without the first token": and_masks(causal_mask_function, lambda b, h, q, k: k > 0),
    "what reads tokens": lambda b, h, q, k: torch.zeros(2, 3)[q, k] > 0,
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_masks(kind: str) -> None:
    line = refusal(lambda: causal_mask(mask_function=OTHER[kind], config=tiny_llama()).window)
    assert "llama: its config asks for attention that is neither causal nor a sliding window; popcompile" in line


@cache
def seeing_images() -> PreTrainedModel:
    return AutoModelForImageTextToText.from_config(gemma3(2), attn_implementation="popcompile")


def test_images() -> None:
    masks = image_masks(seeing_images())
    assert {kind: (mask.window, mask.shows_images) for kind, mask in masks.items()} == {
        "full_attention": (0, True),
        "sliding_attention": (12, True),
    }


def blocks_of(token_type_ids: Tensor) -> Rule:
    return blockwise_overlay(get_block_sequence_ids_for_mask(token_type_ids))


#: made of the types of tokens
OTHER_OF_IMAGES: dict[str, Callable[[Tensor], Rule]] = {
    "causal": lambda types: causal_mask_function,
    "an image alone": blocks_of,
    "the whole of an image beyond a window": lambda types: or_masks(
        sliding_window_causal_mask_function(12), blocks_of(types)
    ),
    "all images": lambda types: or_masks(
        causal_mask_function, lambda b, h, q, k: (types[b, q] > 0) & (types[b, k] > 0)
    ),
    "text that sees images": lambda types: or_masks(causal_mask_function, lambda b, h, q, k: types[b, k] > 0),
    "two tokens at a time": lambda types: or_masks(causal_mask_function, lambda b, h, q, k: q // 2 == k // 2),
}


@pytest.mark.parametrize("kind", OTHER_OF_IMAGES)
def test_other_masks_of_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def masks(token_type_ids: Tensor, config: PreTrainedConfig, **_: Any) -> dict[str, Mask]:
        return {"full_attention": causal_mask(mask_function=OTHER_OF_IMAGES[kind](token_type_ids), config=config)}

    monkeypatch.setattr(seeing_images(), "create_masks_for_generate", masks)
    line = refusal(lambda: image_masks(seeing_images()))
    assert line.startswith("Gemma3ForConditionalGeneration sees its images by another rule than popcompile supports")


def test_a_mask_can_only_be_handed_on() -> None:
    for use in (lambda m: m[:, :, 0], lambda m: m + 1, lambda m: m.shape, lambda m: m.to(torch.float32)):
        assert "model_a: computes with its attention mask" in refusal(lambda use=use: use(Mask("model_a", 0)))


CONFIGS: dict[str, PreTrainedConfig] = {
    "gemma3": tiny_gemma3(use_bidirectional_attention=True),
    "any": tiny_llama(is_causal=False),
    "chunked": AutoConfig.for_model(
        "llama4_text", vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        attention_chunk_size=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_where_it_is_traced(name: str) -> None:
    assert "asks for attention that is neither causal nor a sliding window" in refusal(lambda: trace(CONFIGS[name]))


def test_each_layer_has_its_masks_window() -> None:
    graph = trace(tiny_gemma3()).graphs["model"]
    assert [node.args[5] for node in find(graph, op=ops.attention)] == [8, 0, 8]
