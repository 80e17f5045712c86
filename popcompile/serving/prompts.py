"""What clients send becomes a model's inputs: token ids, and pixels where there are pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.request import urlopen

import torch
from PIL.Image import Image
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.loading import one_line
from popcompile.package.manifest import Manifest
from popcompile.runtime.conversation import Encoder, encode
from popcompile.runtime.pictures import decode_picture
from popcompile.serving.errors import ApiError
from popcompile.serving.requests import ImagePart, Message, TextPart

_T = TypeVar("_T")
#: roles that chat templates have no name of their own for
_ROLES = {"developer": "system"}


class Prompts:
    """Encodes prompts for one package, one at a time, in a thread of their own: a long one takes a while."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises PopcompileError where the package has no tokenizer."""
        self._manifest = manifest
        self._encoder = Encoder(folder, manifest, raw=False)
        self._thread = ThreadPoolExecutor(1, "prompts")

    async def of_messages(self, messages: Sequence[Message]) -> dict[str, Tensor]:
        """Inputs of a conversation, through the chat template where there is one. Raises ApiError."""
        return await self._run(lambda: self._encoder.encode([_as_encoded(m) for m in messages]), "messages")

    async def of_prompt(self, prompt: str | list[int]) -> dict[str, Tensor]:
        """Inputs of a text as it is, or of token ids. Raises ApiError."""
        if isinstance(prompt, list):
            return {"input_ids": self._require_ids(prompt)}
        texts = [{"role": "user", "content": prompt}]
        return await self._run(lambda: {"input_ids": encode(self._encoder.tokenizer, texts, raw=True)}, "prompt")

    def room(self, inputs: dict[str, Tensor], limit: int | None) -> int:
        """How many new tokens an answer may have: `limit`, or what the context has room for.

        Raises ApiError where the prompt and so many do not fit, or where the prompt is empty.
        """
        prompt, context = inputs["input_ids"].shape[1], self._manifest.context_length
        if not prompt:
            raise ApiError(400, "the prompt is empty; give some text", "prompt", "invalid_value")
        new = max(1, context - prompt) if limit is None else limit
        if prompt + new > context:
            raise ApiError(
                400,
                f"this model's context has {context} tokens, and the prompt has {prompt} and the answer up to {new};"
                " shorten the prompt, or lower max_tokens",
                "max_tokens" if prompt < context else "messages",
                "context_length_exceeded",
            )
        return new

    async def _run(self, make: Callable[[], _T], param: str) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, make)
        except PopcompileError as error:
            raise ApiError(400, str(error), param, "invalid_value") from error

    def _require_ids(self, ids: Sequence[int]) -> Tensor:
        if not all(0 <= token < self._manifest.vocab_size for token in ids):
            raise ApiError(
                400,
                f"prompt: token ids are from 0 to {self._manifest.vocab_size - 1}; use this model's own tokenizer",
                "prompt",
                "invalid_value",
            )
        return torch.tensor([ids], dtype=torch.int64)


def _as_encoded(message: Message) -> dict[str, object]:
    """A message as chat templates take it; of parts only where there is a picture among them."""
    content: object = message.content
    if isinstance(message.content, list):
        if all(isinstance(part, TextPart) for part in message.content):
            content = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
        else:
            content = [_as_encoded_part(part) for part in message.content]
    return {"role": _ROLES.get(message.role, message.role), "content": content}


def _as_encoded_part(part: TextPart | ImagePart) -> dict[str, object]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": _picture(part.image_url.url)}


def _picture(url: str) -> Image:
    """The picture in a data: URL; nothing is fetched. Raises PopcompileError."""
    if url[:5].lower() != "data:":
        raise PopcompileError("image_url: pictures are not fetched; send them as data: URLs, in base64")
    try:
        with urlopen(url) as opened:
            content = opened.read()
    except (OSError, ValueError) as error:
        raise PopcompileError(f"image_url: no data: URL ({one_line(error)}); send data:image/png;base64,...") from error
    return decode_picture(content, "image_url")
