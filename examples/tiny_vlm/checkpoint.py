"""What a checkpoint folder has beside weights: tokenizer, chat template, configs of the model and its processor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from .conversations import NAMES
from .families import Family

#: words with the space before them, and single digits, as Qwen splits text
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: what merges are learned from, so that each word of the conversations is one token
_WORDS = (
    "Codes", "Again:", "What is in the picture?", "What is first?", "What is last?", "Repeat 0",
    "user\nassistant\nmodel\n\n",
)  # fmt: skip
#: tokens, of which some stand for nothing
VOCABULARY = 448


def new_checkpoint(family: Family, folder: Path) -> PreTrainedModel:
    """Write all files but the weights, and return the model with random ones, drawn with PyTorch's seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(family)
    tokenizer.save_pretrained(folder)
    for name, content in (("preprocessor", family.image_processor), ("processor", family.processor)):
        (folder / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    ids = tokenizer.get_vocab()
    config = family.config({token: ids[token] for token in family.tokens}, VOCABULARY)
    return _initialize(AutoModelForImageTextToText.from_config(config))


def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(family.tokens), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([*_WORDS, *(f" {name}" for name in NAMES)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=family.tokens[0], eos_token=family.end, padding_side="right",
        chat_template=family.template, extra_special_tokens=dict(family.named),
    )  # fmt: skip


@torch.no_grad()
def _initialize(model: PreTrainedModel) -> PreTrainedModel:
    """Larger than transformers does, for few steps: layers see their inputs from the first one on.

    What is added to the residual stream is small at first, so that tokens stay what they are.
    """
    for name, parameter in model.named_parameters():
        fan_in = parameter.shape[0] if name.endswith("mm_input_projection_weight") else parameter[0].numel()
        if parameter.dim() >= 2:
            scale = 1.0 if "embed" in name else 0.7
            nn.init.normal_(parameter, 0, scale * fan_in**-0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.2)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.add_(0.5)
    return model
