"""Which layers to prune: what --prune and --layers say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popcompile.errors import PopcompileError
from popcompile.package.report import format_layers
from popcompile.pruning.request import Request, parse_request


@pytest.mark.parametrize(
    ("prune", "count"),
    [("0", 0), (0, 0), ("10", 10), (29, 29), (" 7 ", 7), ("1/3", 10), ("0/1", 0), ("0.0", 0), (0.33, 10),
     (".5", 15), (1 / 3, 10), (1e-5, 0), ("0.96", 29)],
)  # fmt: skip
def test_how_many_layers(prune: str | int | float | None, count: int) -> None:
    assert parse_request(30, prune, None).layers == list(range(30 - count, 30))


@pytest.mark.parametrize("prune", [None, "auto", " AUTO "])
def test_popcompile_chooses(prune: str | None) -> None:
    assert parse_request(30, prune, None) == Request("auto", [])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("17", [17]),
        ("20-29,17", [17, *range(20, 30)]),
        (" 3 , 1-2 ", [1, 2, 3]),
        ("5-5,5", [5]),
        ("0-28", [*range(29)]),
    ],
)
def test_which_layers(layers: str, chosen: list[int]) -> None:
    assert parse_request(30, None, layers).layers == chosen


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_layers_are_read_as_they_are_printed(case: tuple[int, set[int]]) -> None:
    num_layers, layers = case
    text = format_layers(sorted(layers))
    if layers:
        assert parse_request(num_layers, None, text).layers == sorted(layers)
    else:
        assert text == "none"


@given(st.integers(1, 200), st.fractions(0, 1, max_denominator=1000).filter(lambda f: f.denominator > 1))
def test_a_fraction_never_takes_every_layer(num_layers: int, fraction: Any) -> None:
    try:
        pruned = parse_request(num_layers, str(fraction), None).layers
    except PopcompileError:
        assert fraction * num_layers >= num_layers - 0.5
    else:
        assert len(pruned) < num_layers and abs(len(pruned) - fraction * num_layers) <= 0.5
