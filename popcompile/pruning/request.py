"""Which layers to prune, as the user asked for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from popcompile.arguments import shortened
from popcompile.errors import PopcompileError

_EXAMPLE = "for example --layers 20-29 or --layers 17,20-29"


@dataclass(frozen=True)
class Request:
    """how: "auto", "count" (popcompile chooses which) or "layers". layers: those asked for, the deepest of a count."""

    how: str
    layers: list[int]


def require_request(prune: str | int | float | None, layers: str | None) -> str:
    """Check what can be checked before the model is known; returns the request's `how`. Raises PopcompileError."""
    if layers is not None and prune is not None:
        raise PopcompileError("--prune and --layers are both given; --layers says which, --prune how many: give one")
    if layers is not None:
        _parse_ranges(layers)
        return "layers"
    if prune is None or str(prune).strip().lower() == "auto":
        return "auto"
    _parse_count(str(prune))
    return "count"


def parse_request(num_layers: int, prune: str | int | float | None, layers: str | None) -> Request:
    """What to prune of a model with `num_layers`.

    prune: "auto", a count ("10"), or a fraction of the layers ("1/3", "0.33"); layers: which ones exactly
    ("20-29,17"). Neither: auto. Both: an error. The last layer is free: pruning it changes nothing.
    Raises PopcompileError.
    """
    how = require_request(prune, layers)
    if how == "layers":
        return Request(how, _layers(num_layers, str(layers)))
    if how == "auto":
        return Request(how, [])
    return Request(how, list(range(num_layers - _count(num_layers, str(prune)), num_layers)))


_COUNT = re.compile(r"[+-]?[0-9]{1,9}")
_FRACTION = re.compile(r"[+-]?([0-9]{1,9}/[0-9]{1,9}|[0-9]{0,9}\.[0-9]{1,20}|[0-9]{1,9}(\.[0-9]{1,20})?e-[0-9]{1,2})")


def _parse_count(text: str) -> Fraction | int:
    """A count of layers, or a fraction of them below 1."""
    shown, text = shortened(text), text.strip()
    is_count = _COUNT.fullmatch(text) is not None
    try:
        if not is_count and not _FRACTION.fullmatch(text):
            raise ValueError(text)
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise PopcompileError(
            f"--prune {shown}: neither a count nor a fraction nor auto; for example --prune 10 or --prune 1/3"
        ) from None
    if value < 0 or (not is_count and value >= 1):
        raise PopcompileError(
            f"--prune {shown}: out of range; give a count of at least 0, or a fraction from 0 to below 1"
        )
    return int(value) if is_count else value


def _count(num_layers: int, text: str) -> int:
    value = _parse_count(text)
    count = value if isinstance(value, int) else round(value * num_layers)
    if count >= num_layers:
        raise PopcompileError(
            f"--prune {text}: the model has {num_layers} layers and at least one must encode the prompt;"
            f" prune at most {num_layers - 1}"
        )
    return count


def _parse_ranges(text: str) -> list[tuple[int, int]]:
    """First and last layer of each."""
    ranges = []
    for part in (p.strip() for p in text.split(",")):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        if not match:
            raise PopcompileError(
                f"--layers {shortened(text)}: {shortened(part)!r} is neither a layer nor a range; {_EXAMPLE}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise PopcompileError(f"--layers {shortened(text)}: the range {part} runs backwards; {_EXAMPLE}")
        ranges.append((first, last))
    return ranges


def _layers(num_layers: int, text: str) -> list[int]:
    chosen: set[int] = set()
    for first, last in _parse_ranges(text):
        if last >= num_layers:
            raise PopcompileError(
                f"--layers {shortened(text)}: there is no layer {last}; the model has 0 to {num_layers - 1}"
            )
        chosen.update(range(first, last + 1))
    if len(chosen) == num_layers:
        raise PopcompileError(
            f"--layers {shortened(text)}: at least one of the {num_layers} layers must encode the prompt; prune fewer"
        )
    return sorted(chosen)
