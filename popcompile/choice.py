"""Choose the layers that prefill skips by what skipping them costs on held-out text.

A set grows from the last layer towards the first ones by a layer at a time: each layer is tried on top of the set so
far, calibrated in closed form and measured, and it stays in prefill for now if skipping it costs more than a share of
the budget. Of several such layers in a row the cheapest is skipped all the same, if the budget allows. So a few layers
that do what the deep ones below them do not, such as copying from far back, are kept, and shallower ones are skipped in
their place: with the calibrated bypass a kept layer in the middle reads nearly what it did. Layers that were kept are
tried again at the end, the cheapest first, while the budget allows. Refinement, which takes longer, is for the largest
sets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from popcompile.calibration import Calibration, calibrate
from popcompile.held_out import HeldOut, Loss
from popcompile.hidden_states import HiddenStates
from popcompile.refinement import refine

#: the share of layers that `auto` prunes at most
MOST = 0.6
#: how many of the deep layers `auto` may keep in that
_KEPT = 4
#: the share of the budget that skipping a layer may take; and of how many in a row that take more one is skipped
_STEP, _PATIENCE = 0.25, 4
#: rows of text to calibrate on while a set grows
_FEW_ROWS = 40
#: what refinement leaves of a loss at best, of first tokens and of answers: it is tried on sets that would keep to the
#: budget then
_REFINED, _REFINED_ANSWERS = 0.7, 0.9


@dataclass(frozen=True)
class Budget:
    """The loss that is allowed: KL in nats, of a first token and of answers that stand in the prompt, and perplexity
    over the whole model's. None: any.
    """

    max_kl: float | None = None
    max_ppl_ratio: float | None = None

    def spent(self, loss: Loss) -> float:
        """The share of the budget that a loss takes; above 1 it is overspent."""
        shares = [0.0]
        if self.max_kl is not None:
            shares.append(_share(loss.worst_kl, self.max_kl))
        if self.max_ppl_ratio is not None:
            shares.append(_share(loss.ppl_ratio - 1, self.max_ppl_ratio - 1))
        return max(shares)


#: what rounding alone does to a loss
_ROUNDING = 1e-5


def _share(loss: float, allowed: float) -> float:
    if loss <= _ROUNDING:
        return 0.0
    return loss / allowed if allowed > 0 else float("inf")


@dataclass(frozen=True)
class Candidate:
    """A measured set of pruned layers. refined: its maps are, by gradients."""

    pruned: list[int]
    loss: Loss
    refined: bool = False


class Search:
    """Measures sets of layers; `measured` has all of them, in order."""

    def __init__(
        self,
        states: HiddenStates | None,
        held_out: HeldOut,
        progress: Callable[[str, int, int], Any],
        *,
        steps: int = 0,
        seed: int = 0,
    ) -> None:
        """states: text to calibrate on; None: the layers' own projections. steps, seed: of refinement."""
        self._states, self._held_out = states, held_out
        self._progress, self._steps, self._seed = progress, steps, seed
        self.num_layers = held_out.model.num_layers
        self.measured: list[Candidate] = []
        self._final: dict[tuple[int, ...], Calibration] = {}

    def measure(self, pruned: list[int]) -> Candidate:
        """The set with maps in closed form, of a part of the text."""
        maps = Calibration()
        if self._states is not None:
            few = self._states.thinned(max(1, len(self._states.rows) // _FEW_ROWS))
            maps = calibrate(few, pruned, products=torch.float32)
        measured = Candidate(pruned, self._held_out.measure(pruned, maps))
        self.measured.append(measured)
        return measured

    def finish(self, pruned: list[int]) -> Candidate:
        """The set with its final maps: of all the text, and refined, if that helps."""
        maps = Calibration() if self._states is None else calibrate(self._states, pruned)
        self._final[tuple(pruned)] = maps
        self.measured = [c for c in self.measured if c.pruned != pruned]
        finished = Candidate(pruned, self._held_out.measure(pruned, maps))
        self.measured.append(finished)
        if self._states is None:
            return finished
        refined = refine(
            self._states, pruned, maps, steps=self._steps, seed=self._seed,
            progress=lambda *n: self._progress("refine", *n),
        )  # fmt: skip
        if refined is maps:
            return finished
        better = Candidate(pruned, self._held_out.measure(pruned, refined), refined=True)
        if better.loss.worst_kl >= finished.loss.worst_kl:
            return finished
        self._final[tuple(pruned)] = refined
        self.measured.append(better)
        return better

    def final(self, candidate: Candidate) -> Calibration:
        """The maps of a finished candidate."""
        return self._final[tuple(candidate.pruned)]

    def best(self, count: int, scale: Budget) -> Candidate:
        """`count` layers; finished. scale: the budget whose shares decide which layers are kept."""
        return self.finish(self._grow(scale, count, lambda loss: 0.0, patience=self.num_layers)[-1].pruned)

    def within(self, budget: Budget) -> Candidate:
        """The most layers whose loss is within the budget, else the last layer alone; finished."""
        refines = self._states is not None and self._steps > 0

        def hoped(loss: Loss) -> float:
            return budget.spent(loss) * (_left_by_refinement(loss) if refines else 1.0)

        most = min(largest_count(self.num_layers), self.num_layers - self._held_out.first)
        sets = self._grow(budget, most, hoped, _PATIENCE)
        left = None
        for candidate in reversed(sets[1:]):
            spent = budget.spent(candidate.loss)
            if (hoped(candidate.loss) if left is None else spent * left) > 1:
                continue
            finished = self.finish(candidate.pruned)
            if (remains := budget.spent(finished.loss)) <= 1:
                return finished
            left = remains / max(spent, _ROUNDING)  # of the others as well, more or less: not each of them is tried
        return self.finish(sets[0].pruned)

    def _grow(self, budget: Budget, most: int, hoped: Callable[[Loss], float], patience: int) -> list[Candidate]:
        """Sets of 1 to at most `most` layers, each the one before with one more.

        hoped: the share of the budget that a set with this loss takes at best, at most 1 for each of them.
        """
        sets = [self.measure([self.num_layers - 1])]
        queue = deque(range(self.num_layers - 2, self._held_out.first - 1, -1))
        count = len(queue)
        rejected: list[_Tried] = []
        ahead: list[_Tried] = []
        while queue and len(sets) < most:
            self._progress("choose", count - len(queue), count)
            tried = self._try(queue.popleft(), sets[-1], budget)
            if tried.cost <= _STEP and hoped(tried.candidate.loss) <= 1:
                sets.append(tried.candidate)
                rejected, ahead = rejected + ahead, []
                continue
            ahead.append(tried)
            if len(ahead) == patience:
                cheapest = min(ahead, key=lambda t: t.cost)
                if hoped(cheapest.candidate.loss) > 1:
                    break
                sets.append(cheapest.candidate)
                ahead.remove(cheapest)
                queue.extendleft(t.layer for t in reversed(ahead) if hoped(t.candidate.loss) <= 1)
                rejected, ahead = rejected + [t for t in ahead if hoped(t.candidate.loss) > 1], []
        for again in sorted(rejected + ahead, key=lambda t: t.cost):
            if len(sets) == most:
                break
            tried = self._try(again.layer, sets[-1], budget)
            if hoped(tried.candidate.loss) > 1:
                break
            sets.append(tried.candidate)
        return sets

    def _try(self, layer: int, before: Candidate, budget: Budget) -> _Tried:
        candidate = self.measure(sorted([layer, *before.pruned]))
        return _Tried(layer, candidate, budget.spent(candidate.loss) - budget.spent(before.loss))


class _Tried(NamedTuple):
    """A layer on top of a set. cost: the share of the budget that it adds."""

    layer: int
    candidate: Candidate
    cost: float


def _left_by_refinement(loss: Loss) -> float:
    """The share of a loss that refinement leaves at best, by the kind of text that loses more."""
    return _REFINED_ANSWERS if (loss.retrieval_kl or 0.0) > loss.first_token_kl else _REFINED


def largest_count(num_layers: int) -> int:
    """How many layers `auto` prunes at most."""
    return max(1, int(num_layers * MOST))


def first_candidate(num_layers: int, count: int) -> int:
    """The first layer that may be pruned where `count` are, at most. Layer 0 is always kept, if it can be."""
    return max(min(1, num_layers - count), num_layers - count - max(2, min(_KEPT, count // 2)))
