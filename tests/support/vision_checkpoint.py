"""Tiny Qwen3-VL and Gemma-3 models as users have them: weights, tokenizer and template, processor files; pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vision_reference import BEGIN, END, IMAGE, PATCH, VIDEO, qwen3_vl, random_model

#: tokens that are marks of images, by what they are called
MARKS = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": BEGIN, "<|vision_end|>": END}
GEMMA_MARKS = {"<image_soft_token>": IMAGE, "<start_of_image>": BEGIN, "<end_of_image>": END}
TEMPLATE = (
    "{% for message in messages %}w5 {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %} w6 {% endfor %}"
    "{% if add_generation_prompt %}w7{% endif %}"
)
#: pictures between 16 x 16 and 64 x 64 pixels, in patches of PATCH
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "patch_size": PATCH,
    "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def vision_model() -> PreTrainedModel:
    """With tied embeddings, DeepStack after the first two of six layers, and a context of 512."""
    return random_model(qwen3_vl(max_position_embeddings=512, tie_word_embeddings=True))


def save_vision_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tokenizer = word_tokenizer(96, MARKS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_gemma_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    side, tokens = model.config.vision_config.image_size, model.config.mm_tokens_per_image
    processor = {
        "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
        "image_seq_length": tokens,
        "size": {"height": side, "width": side}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": tokens})
    )
    special = dict(zip(("image_token", "boi_token", "eoi_token"), GEMMA_MARKS, strict=True))
    tokenizer = word_tokenizer(96, GEMMA_MARKS, **special)
    tokenizer.chat_template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>")
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(size: int, marks: Mapping[str, int], **special: str) -> PreTrainedTokenizerFast:
    """Token i is the word "wi"; w1 begins a text, w2 ends it, and what is unknown is w3. special: tokens by name."""
    names = {i: name for name, i in marks.items()}
    words = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(marks))
    ends = {"unk_token": "w3", "bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=special, **ends)


def draw_picture(file: Path, width: int, height: int, text: str = "42") -> Path:
    """Some letters on a coloured ground."""
    picture = Image.new("RGB", (width, height), (width % 256, height % 256, 90))
    ImageDraw.Draw(picture).text((2, 2), text, fill="white")
    picture.save(file)
    return file


def save_pictures(folder: Path) -> list[Path]:
    """Two pictures of unlike sizes in an otherwise empty folder."""
    folder.mkdir()
    return [draw_picture(folder / "a.png", 80, 48), draw_picture(folder / "b.jpg", 64, 64)]
