"""Conversations become what a model is given: token ids, pixels, and which tokens are to be learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from .conversations import Conversation, Document
from .families import Family
from .pictures import Picture, cells

#: what a model takes: tensors by name
Given = dict[str, Tensor]
#: of a document, what can be known
_NUMBERS = re.compile(r"[a-z](\d+)")


class Inputs:
    """Makes batches as the family's processor does; Qwen3-VL's own needs torchvision, for its videos.

    folder: has the tokenizer and the image processor.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family = family
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.image_id = int(self.tokenizer.convert_tokens_to_ids(family.image_token))
        self._answers = re.compile(re.escape(family.answer) + "(.*?" + re.escape(family.end) + ")", re.DOTALL)

    def training_batch(self, examples: Sequence[Conversation | Document]) -> tuple[Given, Tensor]:
        """What the model is given, all turns, and which tokens are to be learned, [rows, tokens]."""
        texts = [self._document(e) if isinstance(e, Document) else self._chat(e) for e in examples]
        given, offsets = self._batch(texts, examples)
        learned = torch.zeros_like(given["input_ids"], dtype=torch.bool)
        for row, (text, example) in enumerate(zip(texts, examples, strict=True)):
            for begin, end in self._learned(text, example):
                learned[row] |= (offsets[row, :, 0] >= begin) & (offsets[row, :, 1] <= end)
        return given, learned & given["attention_mask"].bool()

    def prompts(self, conversations: Sequence[Conversation]) -> Given:
        """What the model is given of each first question, with what stands before an answer."""
        texts = [
            self.tokenizer.apply_chat_template(c.messages()[:1], tokenize=False, add_generation_prompt=True)
            for c in conversations
        ]
        whole = [self._with_images(text, one) for text, one in zip(texts, conversations, strict=True)]
        return self._batch(whole, conversations)[0]

    def pixels(self, pictures: Sequence[Picture]) -> Given:
        """Of all pictures, as the vision tower takes them."""
        found = self.image_processor([picture.image for picture in pictures], return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "image_grid_thw") if name in found}

    def _batch(self, texts: Sequence[str], examples: Sequence[Conversation | Document]) -> tuple[Given, Tensor]:
        """Padded on the right, with the characters of each token, [rows, tokens, 2]."""
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, padding=True, return_tensors="pt", return_offsets_mapping=True
        )
        given = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        given[self.family.kinds] = (given["input_ids"] == self.image_id).int()
        if pictures := [picture for example in examples for picture in example.pictures]:
            given |= self.pixels(pictures)
        return given, encoded["offset_mapping"]

    def _chat(self, conversation: Conversation) -> str:
        text = self.tokenizer.apply_chat_template(conversation.messages(), tokenize=False)
        return self._with_images(text, conversation)

    def _document(self, document: Document) -> str:
        parts = [part if isinstance(part, str) else self.family.image for part in document.opening]
        return self._with_images("".join([self.family.begin, *parts, document.again]), document)

    def _with_images(self, text: str, example: Conversation | Document) -> str:
        """The text with every image's tokens in the place of what the template writes for it."""
        before, *after = text.split(self.family.placeholder)
        begin, end = self.family.around_image
        images = [begin + self.family.image_token * cells(picture) + end for picture in example.pictures]
        return before + "".join(part for pair in zip(images, after, strict=True) for part in pair)

    def _learned(self, text: str, example: Conversation | Document) -> Iterator[tuple[int, int]]:
        """Where what is to be learned begins and ends: answers and their ends, and numbers that are told again."""
        if isinstance(example, Document):
            return (found.span(1) for found in _NUMBERS.finditer(text, len(text) - len(example.again)))
        return (found.span(1) for found in self._answers.finditer(text))
