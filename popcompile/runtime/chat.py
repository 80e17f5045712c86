"""Answer prompts on the terminal, streaming, with time to first token and tokens/s: `popcompile run`."""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from popcompile.errors import PopcompileError
from popcompile.files import read_regular
from popcompile.loading import one_line
from popcompile.runtime.conversation import Encoder, Message, user_message
from popcompile.runtime.generation import PopForCausalLM, load
from popcompile.runtime.pictures import read_picture
from popcompile.runtime.providers import find_provider
from popcompile.terminal import say, without_controls
from popcompile.text.documents import TEXT_BYTES, cannot_read

#: how a line of a chat begins that names a picture
_IMAGE = "/image "


@dataclass(frozen=True)
class Timing:
    """How long an answer took. Seconds; prompt and new in tokens; prefill is the path taken, "pop" or "full"."""

    prompt: int
    new: int
    first_token: float
    total: float
    prefill: str

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, over the time that they took."""
        return (self.new - 1) / (self.total - self.first_token) if self.new > 1 else 0.0

    def __str__(self) -> str:
        speed = f", {self.tokens_per_second:.1f} tokens/s" if self.new > 1 else ""
        return (
            f"{self.prompt} prompt tokens, {self.prefill} prefill:"
            f" time to first token {self.first_token * 1e3:.0f} ms{speed} ({self.new} new tokens)"
        )


class _TimedStreamer(BaseStreamer):
    """Writes text as it comes and remembers when the first token did."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        self._text = _Stream(tokenizer, out)
        self._prompt_seen = False
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter()
        self._prompt_seen = True
        self._text.put(value)

    def end(self) -> None:
        self._text.end()


class _Stream(TextStreamer):
    """TextStreamer to any stream."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._out.isatty():
            text = without_controls(text)
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()


def generate(
    model: PopForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    prefill: str,
    out: TextIO | None = None,
    **arguments: Any,
) -> tuple[str, Timing, Any]:
    """Stream an answer to `out` (default: stdout); returns its text, its timing and the cache after it.

    arguments: of the model's `generate`, pixels of images among them.
    """
    streamer = _TimedStreamer(tokenizer, out or sys.stdout)
    path = model.choose_prefill(prefill)
    started = time.perf_counter()
    result = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        streamer=streamer,
        prefill=prefill,
        return_dict_in_generate=True,
        **arguments,
    )
    total = time.perf_counter() - started
    new = result.sequences[0, input_ids.shape[1] :]
    first = (streamer.first_token or time.perf_counter()) - started
    timing = Timing(int(input_ids.shape[1]), len(new), first, total, path)
    return str(tokenizer.decode(new, skip_special_tokens=True)), timing, result


def answer(folder: Path, options: Namespace) -> None:
    """`popcompile run --prompt`. Raises PopcompileError."""
    prompt = options.prompt if options.prompt is not None else _read_prompt(options.prompt_file)
    _require_text(prompt, "the prompt")
    find_provider(options.provider)
    pictures = [read_picture(file) for file in options.image]
    model = load(folder, provider=options.provider, prefill=options.prefill)
    encoder = Encoder(folder, model.manifest, raw=options.raw)
    inputs = encoder.encode([user_message(prompt, pictures)])
    _, timing, _ = generate(model, encoder.tokenizer, prefill=options.prefill, **inputs, **_sampling(options))
    say(str(timing))


def chat(folder: Path, options: Namespace) -> int:
    """`popcompile run --chat`: a message a line; every turn prefills only what is new. A message that cannot be
    answered is refused in one line on stderr and forgotten, and the chat goes on. A line "/image FILE" puts a picture
    before the next message, where the model takes images.

    Returns the exit status: 2 where a message was refused. Raises PopcompileError.
    """
    find_provider(options.provider)
    first = [read_picture(file) for file in options.image]
    model = load(folder, provider=options.provider, prefill=options.prefill)
    encoder = Encoder(folder, model.manifest, raw=options.raw)
    if first:
        encoder.require_images()
    messages: list[Message] = []
    pictures = first
    cache, known = None, torch.zeros((1, 0), dtype=torch.int64)
    status = 0
    while True:
        if sys.stdin.isatty():
            _prompt_for_message()
        line = _read_message()
        if not line:
            return status
        if not line.strip():
            continue
        try:
            _require_text(line, "the message")
            if model.manifest.images is not None and line.startswith(_IMAGE):
                pictures = [*pictures, read_picture(line.removeprefix(_IMAGE).strip())]
                continue
            turn = [*messages, user_message(line.strip(), pictures)]
            inputs = encoder.encode(turn)
            input_ids = inputs["input_ids"]
            _require_room(model, input_ids, options.max_new_tokens)
        except PopcompileError as error:  # about this message; what goes wrong from here on is about the package
            say(f"popcompile: error: {error}")
            status = 2
            continue
        held = cache.get_seq_length() if cache is not None else 0
        if not torch.equal(input_ids[:, :held], known[:, :held]):
            cache = None  # the template writes an earlier turn differently now that another follows
        text, timing, result = generate(
            model, encoder.tokenizer, prefill=options.prefill, past_key_values=cache, **inputs, **_sampling(options)
        )
        pictures = []
        messages = [*turn, {"role": "assistant", "content": text}]
        cache, known = result.past_key_values, result.sequences
        say(str(timing))


def _prompt_for_message() -> None:
    with contextlib.suppress(OSError):
        print("> ", end="", file=sys.stderr, flush=True)


def _read_message() -> str:
    """A line of stdin, "" at its end."""
    try:
        return sys.stdin.readline()
    except OSError as error:  # a folder, or opened for writing
        reason = error.strerror or one_line(error)
        raise PopcompileError(f"--chat: stdin cannot be read ({reason}); give a terminal or a text file") from error
    except UnicodeDecodeError:
        raise PopcompileError(f"--chat: stdin is not {sys.stdin.encoding} text; convert it") from None


def _require_room(model: PopForCausalLM, input_ids: torch.Tensor, new: int) -> None:
    tokens, limit = input_ids.shape[1], model.manifest.context_length
    if tokens + new > limit:
        raise PopcompileError(
            f"the chat with this message has {tokens} tokens, and with --max-new-tokens {new} more than the model's"
            f" context of {limit}; write less, or begin a new chat"
        )


def _require_text(text: str, what: str) -> None:
    if not text.strip():
        raise PopcompileError(f"{what} is empty; give some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that are no text in the terminal's encoding, as Python passes them on
        raise PopcompileError(
            f"{what} is not {sys.getfilesystemencoding().upper()} text (character {error.start + 1}); convert it, or"
            " set the encoding of the terminal (LANG, PYTHONIOENCODING)"
        ) from None


def _sampling(options: Namespace) -> dict[str, Any]:
    if not options.sample:
        return {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    torch.manual_seed(options.seed)
    return {"max_new_tokens": options.max_new_tokens, "do_sample": True, "temperature": options.temperature}


def _read_prompt(path: Path) -> str:
    try:
        text = read_regular(path, TEXT_BYTES).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise PopcompileError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error
