"""Answers in OpenAI's types, whole and in chunks, with what they took."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from popcompile.serving.answer import Piece


@dataclass
class Answer:
    """One choice, as far as it has come. finish: "stop" or "length", None until its last token."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None


@dataclass
class Tally:
    """What the answers to a request have taken.

    prompt: tokens of all prompts. cached: of these, what was not encoded, for each answer's first sight of its prompt.
    first_token: seconds from the request to its first token.
    """

    prompt: int
    choices: int
    started: float = field(default_factory=time.perf_counter)
    cached: int = 0
    first_token: float = 0.0
    answers: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [Answer() for _ in range(self.choices)]

    def note(self, index: int, piece: Piece, is_first: bool) -> None:
        """Add a piece to the answer `index`. is_first: whether it is the first that its prompt is seen for."""
        answer = self.answers[index]
        self.first_token = self.first_token or time.perf_counter() - self.started
        if is_first and not answer.tokens:
            self.cached += piece.cached
        answer.text += piece.text
        answer.tokens += 1
        answer.finish = piece.finish

    def usage(self) -> dict[str, Any]:
        """Of `CompletionUsage`, and `time_to_first_token`, which OpenAI's has not: seconds, waiting for a place too."""
        new = sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": new,
            "total_tokens": self.prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "time_to_first_token": round(self.first_token, 6),
        }


class Form(ABC):
    """How one endpoint writes its answers to one request."""

    _prefix: str
    _whole: type[BaseModel]
    _chunk: type[BaseModel]
    _object: str
    _chunk_object: str

    def __init__(self, model: str, includes_usage: bool) -> None:
        """includes_usage: whether the last chunk has it."""
        self._head = {"id": f"{self._prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._includes_usage = includes_usage

    def whole(self, tally: Tally) -> BaseModel:
        """All answers at once."""
        choices = [self._choice(i, answer) for i, answer in enumerate(tally.answers)]
        return self._whole.model_validate(
            self._head | {"object": self._object, "choices": choices, "usage": tally.usage()}
        )

    def chunk(self, index: int, text: str | None, finish: str | None = None) -> BaseModel:
        """More of an answer. text: None with the last chunk, which says why it is."""
        return self._made([self._part(index, text, finish)], None)

    def opening(self, index: int) -> Sequence[BaseModel]:
        """What stands before an answer's text."""
        return ()

    def closing(self, tally: Tally) -> Sequence[BaseModel]:
        """What stands behind all answers."""
        return [self._made([], CompletionUsage.model_validate(tally.usage()))] if self._includes_usage else ()

    def _made(self, choices: list[object], usage: CompletionUsage | None) -> BaseModel:
        more = {"usage": usage} if self._includes_usage else {}
        return self._chunk.model_validate(self._head | {"object": self._chunk_object, "choices": choices} | more)

    @abstractmethod
    def _choice(self, index: int, answer: Answer) -> object:
        """A whole answer."""

    @abstractmethod
    def _part(self, index: int, text: str | None, finish: str | None) -> object:
        """A part of an answer."""


class ChatForm(Form):
    """Of /v1/chat/completions."""

    _prefix, _whole, _object = "chatcmpl", ChatCompletion, "chat.completion"
    _chunk, _chunk_object = ChatCompletionChunk, "chat.completion.chunk"

    def opening(self, index: int) -> Sequence[BaseModel]:
        role = {"role": "assistant", "content": ""}
        return [self._made([{"index": index, "delta": role, "finish_reason": None}], None)]

    def _choice(self, index: int, answer: Answer) -> object:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": answer.finish, "logprobs": None}

    def _part(self, index: int, text: str | None, finish: str | None) -> object:
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "finish_reason": finish}


class CompletionForm(Form):
    """Of /v1/completions, whose chunks are like whole answers."""

    _prefix, _whole, _object = "cmpl", Completion, "text_completion"
    _chunk, _chunk_object = Completion, "text_completion"

    def _choice(self, index: int, answer: Answer) -> object:
        return self._part(index, answer.text, answer.finish)

    def _part(self, index: int, text: str | None, finish: str | None) -> object:
        # not validated: the type is that of whole answers, whose finish_reason is never null
        return CompletionChoice.construct(index=index, text=text or "", finish_reason=finish, logprobs=None)


def model_card(name: str, created: int) -> Model:
    """Of /v1/models."""
    return Model(id=name, created=created, object="model", owned_by="popcompile")
