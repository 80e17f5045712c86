"""What decoders are given, and which vision-language models are refused: those that would be given too little."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from conftest import tiny_llama
from image_attention_reference import gemma3
from transformers import AutoConfig, PreTrainedConfig
from vision_reference import HIDDEN, qwen2_5_vl, qwen3_vl

from popcompile.errors import PopcompileError
from popcompile.frontend.token_inputs import Embeddings, Ids, decoder_config, token_inputs
from popcompile.frontend.tracing import trace
from popcompile.passes.graph import tokens_of


def test_text_comes_as_ids() -> None:
    config = tiny_llama()
    assert isinstance(token_inputs(config), Ids) and decoder_config(config) is config
    assert trace(config).inputs == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(("config", "features"), [(qwen3_vl(), 2), (qwen3_vl([0]), 1), (qwen2_5_vl(), 0)])
def test_images_come_as_embeddings(config: PreTrainedConfig, features: int) -> None:
    inputs = token_inputs(config)
    assert isinstance(inputs, Embeddings)
    assert inputs.width == (1 + features) * HIDDEN
    assert decoder_config(config) is config.text_config


def test_sections_that_a_config_leaves_to_the_module() -> None:
    """transformers' module has sections of its own where rope_parameters has none, here of 128 features a head."""
    config = qwen3_vl(num_hidden_layers=2, head_dim=128)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    assert trace(config).inputs == ["inputs_embeds", "attention_mask", "position_ids"]


def test_images_that_are_seen_in_both_directions() -> None:
    """A column says which tokens are an image's, and positions are slots. Before it is built, a model may have any."""
    config = gemma3(3)
    inputs, program = token_inputs(config), trace(config)
    assert isinstance(inputs, Embeddings) and inputs.width == HIDDEN
    assert program.inputs == ["inputs_embeds", "attention_mask"]
    assert tokens_of(program.graphs["model"]).meta["val"].shape[2] == HIDDEN + 1


def test_bf16() -> None:
    gm = trace(qwen3_vl(num_hidden_layers=2), torch.bfloat16).graphs["model"]
    placeholders = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    assert [t.dtype for t in placeholders[:4]] == [torch.bfloat16, torch.int64, torch.int64, torch.bfloat16]


def other(model_type: str) -> PreTrainedConfig:
    """Of another family: four layers are enough to be refused."""
    config = AutoConfig.for_model(model_type)
    config.text_config.num_hidden_layers = 4
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:4]
    return config


def without_features() -> PreTrainedConfig:
    config = deepcopy(qwen3_vl())
    config.vision_config.deepstack_visual_indexes = []
    return config


def with_features() -> PreTrainedConfig:
    config = deepcopy(qwen2_5_vl())
    config.vision_config.deepstack_visual_indexes = [0]
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(other("paligemma"), "PaliGemmaForConditionalGeneration sees its images by another rule than",
                     id="a prefix in both directions"),
        pytest.param(other("ernie4_5_vl_moe"), "takes moe_mm_token_type_ids, which is not", id="experts of images"),
        pytest.param(other("idefics3"), "takes pixel_attention_mask, which is not", id="masks of pixels"),
        pytest.param(other("got_ocr2"), "has one position for each token and sees images as text; popcompile",
                     id="one position"),
        pytest.param(without_features(), "Qwen3VLTextModel and its config disagree about DeepStack", id="none"),
        pytest.param(with_features(), "Qwen2_5_VLTextModel and its config disagree about DeepStack", id="some"),
    ],
)  # fmt: skip
def test_what_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(PopcompileError, match=message) as error:
        trace(config)
    assert "\n" not in str(error.value)
