"""Refine calibrated maps by gradients: from the least error in k and v to the least error in the answer.

The regression weighs every direction of k and v alike, whatever attention and the rest of the model make of it. A few
steps of Adam on what counts, KL(whole model || pruned prefill), start from its solution. Each step takes some rows of
the calibration text, and of each row some places as boundary tokens, whatever the window is: steps through the window
cost more and gain the same (README.md). It also takes some texts whose answers stand in them, and of these the answers'
tokens, after a prompt with its window: few tokens depend on what stands far back, and these do. They are texts that the
regression has not seen: more of what it has seen gains nothing. The model's weights stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from popcompile.pruning.hidden_states import HiddenStates, at_positions
from popcompile.pruning.pruned_prefill import Prompts, last_hidden_state
from popcompile.pruning.regression import Calibration

#: steps by default, and rows and boundary tokens of each row that a step takes; where there are texts with answers,
#: half of the rows are of these
STEPS, _ROWS, _BOUNDARY_TOKENS = 64, 8, 32
#: position of the earliest boundary token
_EARLIEST = 8
#: Adam's step, relative to the root mean square of a map's weight
_RATE = 6e-3


@dataclass(frozen=True)
class Answers:
    """Text whose answers stand in it.

    of_answer [N, T]: whether a token of states.rows is a part of one. context: tokens of a row that a pruned prefill
    encodes; those after it take the whole model.
    """

    states: HiddenStates
    of_answer: Tensor
    context: int


def refine(
    states: HiddenStates,
    pruned: list[int],
    calibration: Calibration,
    *,
    answers: Answers | None = None,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Calibration:
    """Maps in place of these layers that lose less, starting from `calibration`; it is left as it is.

    Layers for which it has no map keep their own projections. seed: of the rows and boundary tokens of each
    step.
    """
    if steps == 0 or not calibration.projections:
        return calibration
    refined = calibration.each(lambda t: t.clone().requires_grad_())
    maps = [*refined.projections.values(), *refined.bypasses.values()]
    rates = [_RATE * float(m.weight.detach().pow(2).mean().sqrt()) for m in maps]
    groups = [{"params": [m.weight, m.bias, m.sink], "lr": rate} for m, rate in zip(maps, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    random = Generator().manual_seed(seed)
    size = _ROWS // 2 if answers else _ROWS
    rows = _shuffled(len(states.rows), size, random)
    asked = _shuffled(len(answers.states.rows), size, random) if answers else iter(())
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            _loss(states, pruned, refined, next(rows), random).backward()
            if answers:
                _answers_loss(answers, pruned, refined, next(asked)).backward()
            optimizer.step()
            schedule.step()
            states.release()
            if progress:
                progress(step + 1, steps)
    return refined.each(Tensor.detach)


def _loss(states: HiddenStates, pruned: list[int], calibration: Calibration, rows: Tensor, random: Generator) -> Tensor:
    """Mean first-token KL of some boundary tokens of these rows, but for a constant: the whole model's entropy."""
    model, first = states.model, pruned[0]
    text = states.rows[rows]
    positions = text.draw_slots(min(_EARLIEST, text.length // 2), text.length, _BOUNDARY_TOKENS, random)
    x, final = _before(states, first, rows), _before(states, model.num_layers, rows)
    prompts = Prompts.of(model, text, text.length, positions, begins=positions)
    y = last_hidden_state(model, prompts, (x, at_positions(x, positions)), first, pruned, calibration)
    with torch.no_grad():
        likely = model.logits(at_positions(final, positions), prompts.tail).flatten(0, 1).softmax(-1)
    return cross_entropy(model.logits(y, prompts.tail).flatten(0, 1), likely)


def _answers_loss(answers: Answers, pruned: list[int], calibration: Calibration, rows: Tensor) -> Tensor:
    """Mean KL of the answers' tokens of these rows, after their context, but for a constant as `_loss`."""
    states, context = answers.states, answers.context
    model, first = states.model, pruned[0]
    text = states.rows[rows]
    positions = text.slots[:, context:-1]
    measured = answers.of_answer[rows][:, context + 1 :]
    x, final = _before(states, first, rows), _before(states, model.num_layers, rows)
    prompts = Prompts.of(model, text, context, positions, begins=torch.full_like(positions, context))
    y = last_hidden_state(model, prompts, (x[:, :context], x[:, context:-1]), first, pruned, calibration)
    with torch.no_grad():
        likely = model.logits(final[:, context:-1][measured][None], prompts.tail)[0].softmax(-1)
    return cross_entropy(model.logits(y[measured][None], prompts.tail)[0], likely)


def _before(states: HiddenStates, layer: int, rows: Tensor) -> Tensor:
    """Hidden states of these rows before the layer, where the model is."""
    return states.before(layer)[rows].to(states.model.device)


def _shuffled(count: int, size: int, random: Generator) -> Iterator[Tensor]:
    """Indices of a step's rows: all rows in a new order, again and again."""
    while True:
        yield from torch.randperm(count, generator=random).split(size)
