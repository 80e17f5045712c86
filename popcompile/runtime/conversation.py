"""A conversation as a model's inputs: token ids, and pixels where there are pictures in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.loading import one_line, quiet
from popcompile.package.configs import load_processor, load_tokenizer
from popcompile.package.manifest import Manifest

if TYPE_CHECKING:
    from transformers import ProcessorMixin

#: role and content: a text, or a list of parts, of type "image" or "text"
Message = dict[str, Any]


def user_message(text: str, pictures: list[Image]) -> Message:
    """What a user says, after the pictures that it is about."""
    if not pictures:
        return {"role": "user", "content": text}
    parts: list[Any] = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class Encoder:
    """Encodes conversations for one package."""

    def __init__(self, folder: Path, manifest: Manifest, *, raw: bool) -> None:
        """raw: texts as they are, without the chat template. Raises PopcompileError, without a tokenizer too."""
        self._folder, self._manifest, self._raw = folder, manifest, raw
        self.tokenizer = load_tokenizer(folder, manifest)
        self._processor: ProcessorMixin | None = None

    def require_images(self) -> None:
        """Raise PopcompileError where pictures cannot be encoded."""
        if self._manifest.images is None:
            raise PopcompileError(
                f"{self._folder}: {self._manifest.model_type} takes no images, or was converted with --text-only; leave"
                " the image out"
            )
        if self._raw:
            raise PopcompileError("--raw: the chat template says where an image is in a prompt; leave --raw out")

    def encode(self, messages: list[Message]) -> dict[str, Any]:
        """input_ids [1, S], and what the processor makes of pictures. Raises PopcompileError."""
        if all(isinstance(message["content"], str) for message in messages):
            return {"input_ids": encode(self.tokenizer, messages, self._raw)}
        self.require_images()
        if self._processor is None:
            self._processor = load_processor(self._folder, self._manifest)
        conversation = [message | {"content": _parts(message["content"])} for message in messages]
        try:
            with quiet():
                encoded: Any = self._processor.apply_chat_template(
                    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
        except Exception as error:  # a template is a program of the model's author, and processors raise anything
            raise PopcompileError(
                f"{self._folder}: its processor refuses the prompt ({one_line(error)}); give other pictures, or fewer"
            ) from error
        return {name: value for name, value in encoded.items() if name != "attention_mask"}


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message], raw: bool) -> torch.Tensor:
    """Token ids [1, S] of a conversation, through the chat template where there is one and `raw` is false."""
    if tokenizer.chat_template and not raw:
        try:
            encoded: Any = tokenizer.apply_chat_template(
                _as_the_template_reads(tokenizer, messages),
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise PopcompileError(
                f"the chat template refuses the prompt ({one_line(error)}); write the messages as it wants them, or"
                " leave the template out"
            ) from error
        return encoded["input_ids"]
    text = "\n".join(m["content"] for m in messages)
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(torch.int64)  # type: ignore[union-attr]


def _as_the_template_reads(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Message]:
    """The messages, in parts where the template leaves out what is plain text: some multimodal models' templates do."""

    def shows(conversation: list[Message]) -> bool:
        try:
            return messages[-1]["content"].strip() in str(tokenizer.apply_chat_template(conversation, tokenize=False))
        except Exception:  # raised again where the conversation is encoded
            return False

    in_parts = [m | {"content": _parts(m["content"])} for m in messages]
    return in_parts if not shows([*messages]) and shows(in_parts) else [*messages]
