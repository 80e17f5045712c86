"""Refined maps lose less than those in closed form.

Of a random model's layers, which know no language, the gain is in the text refined on; tests/real/test_real_models.py
has the gain in other text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibrated import Traced
from conftest import tiny_gemma3, tiny_llama
from torch import Tensor

from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.refinement import Answers, refine
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.rows import AskedRows, Rows

CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=4),
    # a window shorter than the text
    "gemma3": tiny_gemma3(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2),
}
Traces = Callable[[str], Traced]


@pytest.fixture(scope="module")
def traced() -> Traces:
    made = {family: Traced.of(config) for family, config in CONFIGS.items()}
    return made.__getitem__


def random_rows(count: int, seed: int) -> Tensor:
    return torch.randint(64, (count, 28), generator=torch.Generator().manual_seed(seed))


def tensors(calibration: Calibration) -> list[Tensor]:
    found: list[Tensor] = []
    calibration.each(lambda t: found.append(t) or t)
    return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pruned", [[2, 3], [1, 3], [1, 2]], ids=str)
@torch.no_grad()
def test_refined_maps_lose_less(traced: Traces, family: str, pruned: list[int], tmp_path: Path) -> None:
    layers = traced(family).layers
    states = HiddenStates(layers, Rows(random_rows(16, 1)), 1, tmp_path)
    same_text = HeldOut(layers, states.rows, 1, 22, seed=0)
    closed_form = calibrate(states, pruned)
    before = [t.clone() for t in tensors(closed_form)]
    refined = refine(states, pruned, closed_form, steps=60)
    kl = {name: same_text.measure(pruned, c).first_token_kl for name, c in (("0", closed_form), ("60", refined))}
    assert kl["60"] < 0.8 * kl["0"]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(closed_form), strict=True)), "the start is left alone"
    assert not any(t.requires_grad for t in tensors(refined))
    assert refined.projections.keys() == closed_form.projections.keys()
    assert refined.bypasses.keys() == closed_form.bypasses.keys()


@torch.no_grad()
def test_answers_are_refined(traced: Traces, tmp_path: Path) -> None:
    """What follows a row's context is what the whole model answers, so that it finds all of it."""
    layers, context, prompt = traced("llama").layers, 20, 22
    rows = random_rows(16, 1)
    for place in range(prompt, 28):
        final = HiddenStates(layers, Rows(rows), 3, tmp_path).before(4)[:, place - 1 : place]
        tokens = layers.tokens(Rows(rows), torch.full((16, 1), place - 1))
        rows[:, place] = layers.logits(final, tokens)[:, 0].argmax(-1)
    of_answer = torch.zeros_like(rows, dtype=torch.bool)
    of_answer[:, prompt:] = True
    states = HiddenStates(layers, Rows(rows), 1, tmp_path)
    text = AskedRows(Rows(rows), of_answer)
    held_out = HeldOut(layers, Rows(rows), 1, prompt, seed=0, window=prompt - context, retrieval=text)
    closed_form = calibrate(states, [2, 3])
    maps = {
        "closed form": closed_form,
        "first tokens": refine(states, [2, 3], closed_form, steps=60),
        "answers": refine(states, [2, 3], closed_form, answers=Answers(states, of_answer, context), steps=60),
    }
    losses = {name: held_out.measure([2, 3], its) for name, its in maps.items()}
    assert all(loss.retrieval_found == 1.0 for loss in losses.values())
    kl = {name: loss.retrieval_kl or 0.0 for name, loss in losses.items()}
    assert 0 < kl["answers"] < 0.8 * kl["closed form"] and kl["answers"] < 0.9 * kl["first tokens"], kl


@torch.no_grad()
def test_a_seed_repeats(traced: Traces, tmp_path: Path) -> None:
    states = HiddenStates(traced("llama").layers, Rows(random_rows(20, 1)), 1, tmp_path)
    maps = calibrate(states, [2, 3])
    one, same, other = (tensors(refine(states, [2, 3], maps, steps=5, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def test_nothing_to_refine(traced: Traces, tmp_path: Path) -> None:
    states = HiddenStates(traced("llama").layers, Rows(random_rows(8, 1)), 3, tmp_path)
    maps = calibrate(states, [3])
    assert not maps.projections  # the first pruned layer sees its own input
    assert refine(states, [3], maps) is maps
    states = HiddenStates(traced("llama").layers, Rows(random_rows(8, 1)), 2, tmp_path)
    maps = calibrate(states, [2, 3])
    assert refine(states, [2, 3], maps, steps=0) is maps
