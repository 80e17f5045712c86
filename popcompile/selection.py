"""Which layers to prune, as the user asked for it."""

from __future__ import annotations

import re
from fractions import Fraction

from popcompile.errors import PopcompileError

_EXAMPLE = "for example --layers 20-29 or --layers 17,20-29"


def select_layers(num_layers: int, prune: str | int | float | None, layers: str | None) -> list[int]:
    """The pruned layers of a model with `num_layers`, ascending.

    prune: a count ("10"), or a fraction of the layers ("1/3", "0.33"), the deepest ones being taken; layers: which
    ones exactly ("20-29,17"). Neither: a third. Both: an error. The last layer is free: pruning it changes nothing.
    Raises PopcompileError.
    """
    if layers is not None and prune is not None:
        raise PopcompileError("--prune and --layers are both given; --layers says which, --prune how many: give one")
    if layers is not None:
        return _parse_layers(num_layers, layers)
    count = _parse_count(num_layers, "1/3" if prune is None else str(prune))
    return list(range(num_layers - count, num_layers))


def _parse_count(num_layers: int, text: str) -> int:
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise PopcompileError(
            f"--prune {text}: neither a count nor a fraction; for example --prune 10 or --prune 1/3"
        ) from None
    whole = value.denominator == 1 and "." not in text and "/" not in text
    if value < 0 or (not whole and value >= 1):
        raise PopcompileError(f"--prune {text}: out of range; a fraction is at least 0 and below 1")
    count = int(value) if whole else round(value * num_layers)
    if count >= num_layers:
        raise PopcompileError(
            f"--prune {text}: the model has {num_layers} layers and at least one must encode the prompt;"
            f" prune at most {num_layers - 1}"
        )
    return count


def _parse_layers(num_layers: int, text: str) -> list[int]:
    chosen: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if not match:
            raise PopcompileError(f"--layers {text}: {part!r} is neither a layer nor a range; {_EXAMPLE}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise PopcompileError(f"--layers {text}: the range {part} runs backwards; {_EXAMPLE}")
        if last >= num_layers:
            raise PopcompileError(f"--layers {text}: the model has layers 0 to {num_layers - 1}, there is no {last}")
        chosen.update(range(first, last + 1))
    if len(chosen) == num_layers:
        raise PopcompileError(f"--layers {text}: at least one of the {num_layers} layers must encode the prompt")
    return sorted(chosen)


def format_layers(layers: list[int]) -> str:
    """[17, 20, 21, 22] -> "17,20-22"; no layers -> "none"."""
    from popcompile.passes.graph import runs

    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs(layers)]
    return ",".join(parts) or "none"
