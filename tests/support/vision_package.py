"""A tiny vision-language checkpoint as a user has it: tokenizer, chat template and processor beside random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vision_reference import BEGIN, END, IMAGE, PATCH, VIDEO, qwen3_vl, random_model

MARKS = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": BEGIN, "<|vision_end|>": END}
_PROCESSOR = {
    "size": {"longest_edge": 4096, "shortest_edge": 256}, "patch_size": PATCH, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}w5 {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %} w6 {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
)


def save_vision_model(folder: Path, **changes: Any) -> Path:
    """Qwen3-VL of four layers and words "w0" to "w89". changes: of its text config."""
    config = qwen3_vl(**{"num_hidden_layers": 4, "max_position_embeddings": 256} | changes)
    config.tie_word_embeddings = True
    random_model(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(IMAGE)} | MARKS, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(MARKS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", eos_token="w2", bos_token="w1")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    return folder


def save_pictures(folder: Path) -> list[Path]:
    """Two pictures of unlike sizes in an otherwise empty folder."""
    folder.mkdir()
    number = Image.new("RGB", (80, 48), "white")
    ImageDraw.Draw(number).text((4, 4), "42", fill="red")
    number.save(folder / "a.png")
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(folder / "b.jpg")
    return [folder / "a.png", folder / "b.jpg"]
