"""Self-made pictures: pages of text, lists, tables, plots and shapes, in several fonts, sizes and layouts.

They need no data. The text is the caller's, who samples it from the model itself, and the rest is drawn by a seed.
Pictures may have any size, and something stands in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

#: width and height in pixels
Size = tuple[int, int]
_Color = tuple[int, int, int]

#: files of fonts that matplotlib brings, and "" for PIL's own. Of these the first has the most characters
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "")
#: heights of letters in pixels, the smallest of where much has to fit, and of a line, by its letters'
_HEIGHTS, _LEAST, _LINE = range(10, 25), 9, 1.3
#: the share of pictures that are light on dark, and of pages that have a title, and two columns where they are so many
#: letters wide
_DARK, _TITLES, _TWO_COLUMNS, _WIDE = 0.2, 0.4, 0.3, 24
#: of tables, plots and shapes
_ROWS, _COLUMNS, _BARS, _SHAPES = range(2, 9), range(2, 5), range(3, 8), range(4, 12)


def is_legible(word: str) -> bool:
    """Whether its letters are drawn as they are, one behind the other from the left: Latin, Greek and Cyrillic ones."""
    return all(c < "\u0530" and c in _characters(_FONTS[0]) for c in word)


def draw_picture(text: str, words: Sequence[str], size: Size, choice: random.Random) -> Image.Image:
    """A page of the text or, as often, a table, a plot or shapes. words: what things are named by, at least one."""
    if choice.random() < 0.5:
        return draw_page(text, size, choice)
    drawn: Callable[..., Image.Image] = choice.choice((_some_table, _plot, _shapes))
    return drawn(words, size, choice)


def draw_page(text: str, size: Size, choice: random.Random) -> Image.Image:
    """As much of the text as there is room for."""
    sheet = _Sheet(size, text, choice)
    text = sheet.known(text) or str(choice.randrange(10**12))
    height = min(choice.choice(_HEIGHTS), max(_LEAST, size[1] // 2))
    top = sheet.margin
    if choice.random() < _TITLES:
        title = next(sheet.wrapped(text, size[0] - 2 * sheet.margin, height * 3 // 2))
        top += sheet.write(title, (sheet.margin, top), height * 3 // 2)
        text = text.removeprefix(title)
    columns = 2 if size[0] > _WIDE * height and choice.random() < _TWO_COLUMNS else 1
    width = (size[0] - (columns + 1) * sheet.margin) // columns
    lines = sheet.wrapped(text, width, height)
    for column in range(columns):
        left, y = sheet.margin + column * (width + sheet.margin), top
        while y + height <= size[1] and (line := next(lines, None)) is not None:
            y += sheet.write(line, (left, y), height)
    return sheet.finished()


def draw_lines(lines: Sequence[str], size: Size, choice: random.Random) -> tuple[Image.Image, int]:
    """The lines in letters as large as allow all of them; returns how many from the first there was room for."""
    picture, count, _ = draw_table([(line,) for line in lines], size, choice, ruled=False)
    return picture, count


def draw_table(
    rows: Sequence[Sequence[str]], size: Size, choice: random.Random, *, ruled: bool = True
) -> tuple[Image.Image, int, int]:
    """Cells in letters as large as allow all of them; returns how many rows and columns there was room for.

    ruled: with lines between the cells.
    """
    sheet = _Sheet(size, "".join(cell for row in rows for cell in row), choice)
    known = [[sheet.known(cell) for cell in row] for row in rows]
    room = (size[0] - 2 * sheet.margin, size[1] - 2 * sheet.margin)
    largest = choice.choice(_HEIGHTS)
    for height in range(largest, _LEAST - 1, -1):
        line, gap = round(height * _LINE) + (2 if ruled else 0), height // 2
        widths = [max(sheet.length(row[i], height) for row in known) + 2 * gap for i in range(len(known[0]))]
        if sum(widths) <= room[0] and len(known) * line <= room[1]:
            break
    columns = sum(sum(widths[: i + 1]) <= room[0] for i in range(len(widths)))
    shown = min(len(known), room[1] // line) if columns else 0
    right, bottom = sheet.margin + sum(widths[:columns]), sheet.margin + shown * line
    for i in range(shown):
        for j in range(columns):
            place = (sheet.margin + sum(widths[:j]) + gap, sheet.margin + i * line + (1 if ruled else 0))
            sheet.write(known[i][j], place, height)
    if ruled and shown:
        for i in range(shown + 1):
            y = sheet.margin + i * line
            sheet.draw.line((sheet.margin, y, right, y), sheet.ink)
        for j in range(columns + 1):
            x = sheet.margin + sum(widths[:j])
            sheet.draw.line((x, sheet.margin, x, bottom), sheet.ink)
    return sheet.finished(), shown, columns


def _some_table(words: Sequence[str], size: Size, choice: random.Random) -> Image.Image:
    columns = choice.choice(_COLUMNS)
    head = [choice.choice(words) for _ in range(columns)]
    rows = [[choice.choice(words), *(_number(choice) for _ in range(columns - 1))] for _ in range(choice.choice(_ROWS))]
    return draw_table([head, *rows], size, choice)[0]


def _plot(words: Sequence[str], size: Size, choice: random.Random) -> Image.Image:
    """Bars, or a line through points, over words, with their values."""
    sheet = _Sheet(size, "".join(words), choice)
    values = [choice.randint(1, 99) for _ in range(choice.choice(_BARS))]
    letters = max(_LEAST, min(size) // 20)
    left, right, top, bottom = sheet.margin, size[0] - sheet.margin, sheet.margin + 2 * letters, size[1] - 2 * letters
    sheet.write(sheet.known(choice.choice(words)), (left, 0), letters)
    step, color, as_bars = (right - left) / len(values), _color(choice, 60, 200), choice.random() < 0.5
    points = [(left + (i + 0.5) * step, bottom - (bottom - top) * value / 100) for i, value in enumerate(values)]
    for (x, y), value in zip(points, values, strict=True):
        if as_bars:
            sheet.draw.rectangle((x - step / 3, min(y, bottom), x + step / 3, max(y, bottom)), color, sheet.ink)
        sheet.write(str(value), (int(x - step / 3), int(y - _LINE * letters)), letters)
        sheet.write(sheet.known(choice.choice(words)), (int(x - step / 3), bottom + 1), letters)
    if not as_bars:
        sheet.draw.line(points, color, width=2)
    sheet.draw.line((left, top, left, bottom, right, bottom), sheet.ink)
    return sheet.finished()


def _shapes(words: Sequence[str], size: Size, choice: random.Random) -> Image.Image:
    """Colored shapes over one another, on a ground that fades from one color to another; one bears a word."""
    sheet = _Sheet(size, "".join(words), choice)
    mask = Image.linear_gradient("L").rotate(choice.choice((0, 90, 180, 270))).resize(size)
    sheet.draw.bitmap((0, 0), mask, _color(choice, 0, 255))
    for _ in range(choice.choice(_SHAPES)):
        xs, ys = (sorted(choice.randint(-side // 4, side * 5 // 4) for _ in range(2)) for side in size)
        box = (xs[0], ys[0], xs[1], ys[1])
        choice.choice((sheet.draw.ellipse, sheet.draw.rectangle))(box, _color(choice, 0, 255))
    height = max(_LEAST, min(size) // 8)
    sheet.write(sheet.known(choice.choice(words)), (choice.randint(0, size[0] // 2), size[1] // 2), height)
    return sheet.finished()


class _Sheet:
    """What is drawn on: its size, colors and font are drawn by the seed, and the font has the text's characters."""

    def __init__(self, size: Size, text: str, choice: random.Random) -> None:
        light, dark = _color(choice, 200, 255), _color(choice, 0, 90)
        self._paper, self.ink = (dark, light) if choice.random() < _DARK else (light, dark)
        self.margin = choice.randint(0, min(size) // 12)
        self._image = Image.new("RGB", size, self._paper)
        self.draw = ImageDraw.Draw(self._image)
        characters = set(text)
        missing = {file: len(characters - _characters(file)) for file in _FONTS}
        self._file = choice.choice([file for file in _FONTS if missing[file] == min(missing.values())])

    def known(self, text: str) -> str:
        """The text on one line, without characters that the font lacks."""
        return " ".join("".join(c for c in text if c.isspace() or c in _characters(self._file)).split())

    def length(self, text: str, height: int) -> int:
        """The width of a text in pixels."""
        return round(_font(self._file, height).getlength(text))

    def wrapped(self, text: str, width: int, height: int) -> Iterator[str]:
        """Its lines. A word that is wider is a line, and has its end cut off."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and self.length(longer, height) > width:
                yield line
                longer = word
            line = longer
        yield line

    def write(self, line: str, place: tuple[int, int], height: int) -> int:
        """Returns how many pixels further down the next line is. place: the left upper corner."""
        self.draw.text(place, line, self.ink, _font(self._file, height))
        return round(height * _LINE)

    def finished(self) -> Image.Image:
        """The picture. Where there was no room for anything, or one shape has hidden all, there is a line across it."""
        if len(self._image.getcolors(1) or ()) == 1:
            hidden = self._image.getpixel((0, 0)) == self.ink
            self.draw.line((0, 0, *self._image.size), self._paper if hidden else self.ink)
        return self._image


@cache
def _font(file: str, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(_path(file), height) if file else ImageFont.load_default(height)


@cache
def _characters(file: str) -> frozenset[str]:
    """What a font has letters for; of PIL's own, which does not tell, ASCII is taken for that."""
    return frozenset(map(chr, FT2Font(_path(file)).get_charmap() if file else range(32, 127)))


def _path(file: str) -> str:
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", file))


def _color(choice: random.Random, least: int, most: int) -> _Color:
    return choice.randint(least, most), choice.randint(least, most), choice.randint(least, most)


def _number(choice: random.Random) -> str:
    return str(choice.randint(0, 9999))
