"""The two tiny models: what a Qwen3-VL and a Gemma-3 differ in, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Gemma3Config, PreTrainedConfig, Qwen3VLConfig

from .pictures import CELL

#: pixels along each side of a patch
PATCH = 8
HIDDEN = 96
#: both decoders. Gemma-3's and Qwen3-VL's q and k norms come by themselves
_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "patch_size": PATCH}
_PIXELS = {"do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
Ids = Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """
    tokens: special tokens, of which the first pads; `named` are those that the tokenizer knows by a name. end: ends a
    turn. answer: what stands before an answer. template: the chat template. config: makes the model's, of token ids
    and the size of the vocabulary. image_processor: preprocessor_config.json. processor: processor_config.json.
    image: what the template writes for an image, of which a processor replaces the `placeholder` by as many of
    `image_token` as the image has, between the two texts of `around_image`. begin: what a document begins with, before
    all text. kinds: the model's argument that says which tokens are an image's. sizes: of pictures, width and height in
    pixels.
    """

    tokens: tuple[str, ...]
    named: Mapping[str, str]
    end: str
    answer: str
    template: str
    config: Callable[[Ids, int], PreTrainedConfig]
    image_processor: Mapping[str, Any]
    processor: Mapping[str, Any]
    placeholder: str
    image_token: str
    begin: str
    image: str
    kinds: str
    around_image: tuple[str, str]
    sizes: tuple[tuple[int, int], ...]


def _qwen3_vl(ids: Ids, vocabulary: int) -> Qwen3VLConfig:
    """Interleaved M-RoPE, and DeepStack features of both its first two vision layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"vocab_size": vocabulary, "rope_parameters": rope, **_token_ids(ids, "<|im_end|>")}
    vision = {
        "depth": 3, "num_heads": 4, "spatial_merge_size": CELL // PATCH, "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=_TEXT | text, vision_config=_VISION | vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def _gemma3(ids: Ids, vocabulary: int) -> Gemma3Config:
    """Sliding windows of 12 tokens, shorter than an image of 16, in every other layer."""
    text = {
        "vocab_size": vocabulary, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "query_pre_attn_scalar": 32, **_token_ids(ids, "<end_of_turn>"), "bos_token_id": ids["<bos>"],
    }  # fmt: skip
    vision = {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "vision_use_head": False}
    return Gemma3Config(
        text_config=_TEXT | text, vision_config=_VISION | vision, mm_tokens_per_image=16, tie_word_embeddings=True,
        image_token_index=ids["<image_soft_token>"], boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
    )  # fmt: skip


def _token_ids(ids: Ids, end: str) -> dict[str, int | None]:
    return {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": ids[end]}


def _template(begin: str, turn: str, model: str, end: str, image: str) -> str:
    """Turns of text and images. begin: before all. turn: begins a turn. model: the assistant's name in it."""
    return (
        "{{ '" + begin + "' }}{% for message in messages %}"
        "{% set role = '" + model + "' if message.role == 'assistant' else message.role %}"
        "{{ '" + turn + "' + role + '\\n' }}"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ '" + image + "' }}{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}{{ '" + end + "\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + turn + model + "\\n' }}{% endif %}"
    )


FAMILIES = {
    "qwen3_vl": Family(
        tokens=(
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>",
        ),
        named={},
        end="<|im_end|>",
        answer="<|im_start|>assistant\n",
        template=_template(
            "", "<|im_start|>", "assistant", "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
        config=_qwen3_vl,
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": PATCH, "temporal_patch_size": 2,
            "merge_size": CELL // PATCH, "size": {"shortest_edge": CELL**2, "longest_edge": 16384}, **_PIXELS,
        },
        processor={"processor_class": "Qwen3VLProcessor"},
        placeholder="<|image_pad|>",
        image_token="<|image_pad|>",
        begin="",
        kinds="mm_token_type_ids",
        image="<|vision_start|><|image_pad|><|vision_end|>",
        around_image=("", ""),
        sizes=((32, 32), (48, 32), (64, 32), (48, 48), (64, 48)),
    ),
    "gemma3": Family(
        tokens=(
            "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
            "<image_soft_token>",
        ),
        named={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "bos_token": "<bos>",
        },
        end="<end_of_turn>",
        answer="<start_of_turn>model\n",
        template=_template("<bos>", "<start_of_turn>", "model", "<end_of_turn>", "<start_of_image>"),
        config=_gemma3,
        image_processor={
            "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 64, "width": 64}, "do_resize": True,
            "resample": 2, "do_convert_rgb": True, **_PIXELS,
        },
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 16},
        placeholder="<start_of_image>",
        image_token="<image_soft_token>",
        begin="<bos>",
        kinds="token_type_ids",
        image="<start_of_image>",
        around_image=("\n\n<start_of_image>", "<end_of_image>\n\n"),
        sizes=((64, 64),),
    ),
}  # fmt: skip
