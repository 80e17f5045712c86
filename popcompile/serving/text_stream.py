"""Tokens become text as they come: whole characters only, and nothing behind a stop string, wherever tokens end."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer.

    A few tokens before each are decoded with it, for a token's text can depend on them; a character whose bytes are not
    all there yet, and what may be the beginning of a stop string, are held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        #: of the tokens that are decoded again, and behind those whose text is known
        self._begin = self._known = 0
        self._held = ""
        self.is_stopped = False

    def put(self, token: int) -> str:
        """The text that is certain with this token. Empty once a stop string was found."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE) or not text:
            return ""
        self._begin, self._known = self._known, len(self._ids)
        return self._until_stop(text)

    def end(self) -> str:
        """What was held back, once no token follows."""
        text = self._until_stop(self._new_text())
        text, self._held = text + self._held, ""
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._begin : self._known])
        return self._decode(self._ids[self._begin :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _until_stop(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
