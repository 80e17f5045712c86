"""Text comes in whole characters, ends before stop strings, and is what the tokens are together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from popcompile.serving.text_stream import TextStream


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, so that characters and stop strings have borders of tokens inside."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZER = byte_tokenizer()


def streamed(text: str, stop: tuple[str, ...] = (), cut: int = 0) -> list[str]:
    """The pieces of a text without the last `cut` tokens of it."""
    stream = TextStream(TOKENIZER, stop)
    ids = TOKENIZER(text)["input_ids"]
    pieces = []
    for token in ids[: len(ids) - cut]:
        pieces.append(stream.put(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.end()]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=30))
def test_pieces_are_the_text(text: str) -> None:
    assert "".join(streamed(text)) == text


def test_characters_come_whole() -> None:
    pieces = streamed("aß\N{CAT FACE}b")
    assert pieces == ["a", "", "ß", "", "", "", "\N{CAT FACE}", "b", ""]


def test_a_character_that_is_cut_off() -> None:
    """As the tokenizer decodes it."""
    ids = TOKENIZER("a\N{CAT FACE}")["input_ids"][:-1]
    assert "".join(streamed("a\N{CAT FACE}", cut=1)) == TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "one EN two E"),
        (("END", "two"), "one EN "),
        (("\N{CAT FACE}",), "one EN two EEND "),
        (("never", "EN two E"), "one "),
        (("EEND x",), "one EN two EEND \N{CAT FACE}"),
    ],
)
def test_stop_strings(stop: tuple[str, ...], expected: str) -> None:
    """Whatever begins like one and is none comes with what follows."""
    assert "".join(streamed("one EN two EEND \N{CAT FACE}", stop)) == expected


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first(text: str, stop: list[str]) -> None:
    found = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    whole = text[: found[0]] if found else text
    ends = [whole.index(s) for s in stop if s in whole]
    assert "".join(streamed(text, tuple(stop))) == whole[: min(ends, default=len(whole))]
