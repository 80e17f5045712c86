"""Text sampled from the model itself: reproducible, after given starts, distributed as transformers' softmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from calibrated import Traced
from conftest import materialise, tiny_gemma3, tiny_llama, transformers_forward
from torch import Tensor, fx

from popcompile.errors import PopcompileError
from popcompile.pruning import sampling
from popcompile.pruning.sampling import begun, sample

CONFIGS = {
    "llama": tiny_llama(),
    "gemma3": tiny_gemma3(),  # a sliding window of 8, shorter than the texts
}
LENGTH = 24


@cache
def traced(family: str) -> Traced:
    return Traced.of(CONFIGS[family])


@cache
def graph(family: str) -> fx.GraphModule:
    source = traced(family)
    return materialise(source.program.graphs["model"], source.program, source.model.state_dict())


STARTS = [torch.tensor(start) for start in ([3], [5, 9, 1], [7], [7], [2, 4], [60, 1, 1, 1, 1])]


def drawn(model: fx.GraphModule, starts: Sequence[Tensor], length: int, **options: Any) -> Tensor:
    """[len(starts), length]"""
    return sample(model, *begun(starts, length), **options).ids


@pytest.mark.parametrize("family", CONFIGS)
def test_a_seed_gives_a_text(family: str) -> None:
    seen: list[tuple[int, int]] = []
    one = drawn(graph(family), STARTS, LENGTH, seed=1, batch=4, progress=lambda *n: seen.append(n))
    assert one.shape == (len(STARTS), LENGTH) and one.dtype == torch.int64
    assert one.min() >= 0 and one.max() < 64
    for row, start in zip(one, STARTS, strict=True):
        assert torch.equal(row[: len(start)], start)
    assert torch.equal(one, drawn(graph(family), STARTS, LENGTH, seed=1, batch=4))
    another = drawn(graph(family), STARTS, LENGTH, seed=2, batch=4)
    assert not any(torch.equal(a, b) for a, b in zip(one, another, strict=True))
    assert not torch.equal(one[2], one[3])  # rows of one start are drawn apart
    steps = 2 * (LENGTH - 1)  # two batches
    assert seen == [(n + 1, steps) for n in range(steps)]


def test_a_start_may_be_the_whole_row() -> None:
    """Nothing is left to draw."""
    whole = torch.arange(5)
    assert torch.equal(drawn(graph("llama"), [whole, whole[:2]], 5, seed=0)[0], whole)
    assert torch.equal(drawn(graph("llama"), [whole[:1]], 1, seed=0), whole[None, :1])


@pytest.mark.parametrize("block", [512, 24])
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_as_frequent_as_they_are_likely(monkeypatch: pytest.MonkeyPatch, family: str, block: int) -> None:
    """Third tokens after two given ones, at two temperatures, by Pearson's chi-squared test; of a vocabulary in one
    block and in three, the last of which is shorter.
    """
    monkeypatch.setattr(sampling, "_BLOCK", block)
    count, start = 6000, torch.tensor([3, 11])
    for seed, heat in enumerate((1.0, 4.0)):
        rows = drawn(graph(family), [start] * count, 3, seed=seed, temperatures=[heat] * count, batch=count)
        logits = transformers_forward(traced(family).model, start[None])[0][0, -1]
        expected = (logits.double() / heat).softmax(-1) * count
        observed = torch.bincount(rows[:, 2], minlength=64).double()
        common = expected >= 5  # the test's usual condition; rare tokens make one cell
        cells = torch.stack([torch.cat((t[common], t[~common].sum()[None])) for t in (observed, expected)])
        if cells[1, -1] < 5:
            cells = cells[:, :-1]
        freedom = cells.shape[1] - 1
        assert freedom >= 5
        squared = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
        assert squared < freedom + 4 * (2 * freedom) ** 0.5  # its mean and four of its standard deviations


@pytest.mark.parametrize("family", CONFIGS)
def test_without_heat_the_likeliest_token_follows(family: str) -> None:
    """transformers' greedy search, row by row; at a temperature of 1e-4 a lead of 0.01 is a certainty."""
    texts = drawn(graph(family), STARTS, LENGTH, seed=0, temperatures=[1e-4] * len(STARTS), batch=4)
    for row, start in zip(texts, STARTS, strict=True):
        assert torch.equal(row, greedy(family, start))


def greedy(family: str, start: Tensor) -> Tensor:
    model = traced(family).model
    found = model.generate(
        start[None], attention_mask=torch.ones_like(start[None]), do_sample=False, max_length=LENGTH,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return found[0]


def test_rows_have_temperatures_of_their_own() -> None:
    starts = [torch.tensor([7])] * 4
    texts = drawn(graph("llama"), starts, LENGTH, seed=0, temperatures=[1e-4, 5.0, 1e-4, 5.0])
    assert torch.equal(texts[0], greedy("llama", starts[0])) and torch.equal(texts[2], texts[0])
    assert not torch.equal(texts[1], texts[0]) and not torch.equal(texts[1], texts[3])


def test_nan_weights_are_one_error() -> None:
    source = traced("llama")
    weights = dict(source.model.state_dict())
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    damaged = materialise(source.program.graphs["model"], source.program, weights)
    with pytest.raises(PopcompileError, match=r"^the model cannot be sampled from: .* fix the checkpoint$"):
        drawn(damaged, STARTS, LENGTH, seed=0)
