"""Self-made pictures: drawn by a seed, of any size, never empty, and with room for what is said to stand in them."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from popcompile.text.documents import default_texts
from popcompile.text.pictures import Size, draw_lines, draw_page, draw_picture, draw_table

WORDS = ("river", "stone", "cloud", "green", "table", "seven")
TEXT = default_texts()["prose"][0]


def is_plain(picture: Image.Image) -> bool:
    return all(low == high for low, high in picture.getextrema())


@pytest.mark.parametrize("size", [(256, 320), (640, 40), (40, 300), (16, 16), (2, 2)])
def test_something_stands_in_each(size: Size) -> None:
    for seed in range(60):
        picture = draw_picture(TEXT, WORDS, size, random.Random(seed))
        assert picture.size == size and picture.mode == "RGB" and not is_plain(picture), seed


@pytest.mark.parametrize(
    "text", ["", "\n \t", "\ue000\ue001", "書かれたもの", "Ελληνικά и русский", "\x00\x07", "word" * 500]
)
def test_any_text_makes_a_page(text: str) -> None:
    for seed in range(20):
        assert not is_plain(draw_page(text, (120, 80), random.Random(seed)))


def test_a_seed_draws_a_picture() -> None:
    one, same, other = (
        [draw_picture(TEXT, WORDS, (200, 160), choice).tobytes() for choice in [random.Random(seed)] for _ in range(8)]
        for seed in (0, 0, 1)
    )
    assert one == same and len({*one, *other}) == 16


def test_everything_stands_in_lists_and_tables_that_have_room() -> None:
    """Words in place of others, or left out, change the picture; letters get smaller where there are more lines."""
    for seed in range(10):
        lines = [f"The code of {word} is {1000 + i}." for i, word in enumerate(WORDS)]
        picture, count = draw_lines(lines, (300, 200), random.Random(seed))
        assert count == len(lines)
        for i in range(len(lines)):
            changed = [line if j != i else line.replace("10", "77") for j, line in enumerate(lines)]
            assert draw_lines(changed, (300, 200), random.Random(seed))[0].tobytes() != picture.tobytes()
        rows = [(word, str(i)) for i, word in enumerate(WORDS)]
        assert draw_table(rows, (200, 200), random.Random(seed))[1:] == (6, 2)


def test_what_has_no_room_is_left_out_from_the_end() -> None:
    lines = [f"The code of {word} is {1000 + i}." for i, word in enumerate(WORDS)]
    for seed in range(10):
        choice = random.Random(seed)
        picture, count = draw_lines(lines * 9, (300, 100), choice)
        assert 5 < count < 12 and not is_plain(picture)
        same, all_of_them = draw_lines(lines * 9 + ["and more"], (300, 100), random.Random(seed))
        assert all_of_them == count and same.tobytes() == picture.tobytes()
        assert draw_lines(lines, (40, 100), random.Random(seed))[1] == 0
        rows, columns = draw_table([("name", "a long name of a column")] * 4, (110, 400), random.Random(seed))[1:]
        assert (rows, columns) == (4, 1)
