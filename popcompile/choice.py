"""Choose the layers that prefill skips by what skipping them costs on held-out text.

Importance proposes, measured loss decides. For every number of layers the candidates are the deepest ones, and sets
that keep a few of the most important layers among them and skip as many shallower ones in their place: with the
calibrated bypass a kept layer in the middle reads nearly what it did. Each candidate is calibrated in closed form and
measured; refinement, which takes longer, is for those at the budget's limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from popcompile.calibration import Calibration, calibrate
from popcompile.held_out import HeldOut, Loss
from popcompile.hidden_states import HiddenStates
from popcompile.refinement import refine

#: the share of layers that `auto` prunes at most
MOST = 0.6
#: how many of the deep layers a candidate keeps
KEPT = range(3)
#: shares of the layers that `auto` measures first, and the loss in budgets that ends it
_SHARES = (0.1, 0.2, 1 / 3, 0.43, 0.5)
_HOPELESS = 2.0
#: what refinement leaves of a loss at best: it is tried on sets that would keep to the budget then
_REFINED = 0.7


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
        importance: Sequence[float],
        progress: Callable[[str, int, int], Any],
        *,
        steps: int = 0,
        seed: int = 0,
    ) -> None:
        """states: text to calibrate on; None: the layers' own projections. importance: of the prefill gates.

        steps, seed: of refinement.
        """
        self._states, self._held_out, self._importance = states, held_out, importance
        self._progress, self._steps, self._seed = progress, steps, seed
        self.num_layers = held_out.model.num_layers
        self.measured: list[Candidate] = []
        self._final: dict[tuple[int, ...], Calibration] = {}

    def measure(self, pruned: list[int]) -> Candidate:
        """The set with maps in closed form."""
        known = next((c for c in self.measured if c.pruned == pruned), None)
        if known is None:
            maps = Calibration() if self._states is None else calibrate(self._states, pruned, products=torch.float32)
            known = Candidate(pruned, self._held_out.measure(pruned, maps))
            self.measured.append(known)
        return known

    def finish(self, candidate: Candidate) -> Candidate:
        """The set with its final maps: refined, if that helps."""
        pruned = candidate.pruned
        if self._states is None:
            self._final[tuple(pruned)] = Calibration()
            return candidate
        self._final[tuple(pruned)] = maps = calibrate(self._states, pruned)
        refined = refine(
            self._states, pruned, maps, steps=self._steps, seed=self._seed,
            progress=lambda *n: self._progress("refine", *n),
        )  # fmt: skip
        if refined is maps:
            return candidate
        finished = Candidate(pruned, self._held_out.measure(pruned, refined), refined=True)
        if finished.loss.worst_kl >= candidate.loss.worst_kl:
            return candidate
        self._final[tuple(pruned)] = refined
        self.measured.append(finished)
        return finished

    def final(self, candidate: Candidate) -> Calibration:
        """The maps of a finished candidate."""
        return self._final[tuple(candidate.pruned)]

    def best(self, count: int) -> Candidate:
        """The candidate of `count` layers with the least KL."""
        found = [self.measure(p) for p in propose(count, self._importance, self._held_out.first)]
        return min(found, key=lambda c: c.loss.worst_kl)

    def within(self, budget: Budget) -> Candidate:
        """The candidate with the most layers whose loss is within the budget, else the last layer alone; finished."""
        most = min(largest_count(self.num_layers), self.num_layers - self._held_out.first)
        within, beyond = 1, most + 1
        chosen = self.measure([self.num_layers - 1])
        coarse = sorted({min(round(self.num_layers * share), most) for share in (*_SHARES, MOST)} - {0, 1})
        for done, count in enumerate(coarse):
            self._progress("choose", done, len(coarse) + 3)
            best = self.best(count)
            spent = budget.spent(best.loss)
            if spent <= 1:
                chosen, within, beyond = best, count, most + 1
            else:
                beyond = min(beyond, count)
            if spent > _HOPELESS:
                break
        while beyond - within > 1:  # between the last that is within the budget and the first that is not
            self._progress("choose", len(coarse), len(coarse) + 3)
            count = (within + beyond) // 2
            best = self.best(count)
            if budget.spent(best.loss) <= 1:
                chosen, within = best, count
            else:
                beyond = count
        if self._states is not None and self._steps > 0:
            while within < most and budget.spent(self.best(within + 1).loss) * _REFINED <= 1:
                within += 1
        left = _REFINED
        while within > len(chosen.pruned):
            best = self.best(within)
            if (spent := budget.spent(best.loss)) * left <= 1:
                refined = self.finish(best)
                if (remains := budget.spent(refined.loss)) <= 1:
                    return refined
                left = remains / spent  # of the others as well, more or less: not each of them is tried
            within -= 1
        return self.finish(chosen)


def largest_count(num_layers: int) -> int:
    """How many layers `auto` prunes at most."""
    return max(1, int(num_layers * MOST))


def first_candidate(num_layers: int, count: int) -> int:
    """The first layer that a candidate of up to `count` layers may prune. Layer 0 is always kept."""
    return max(1, num_layers - count - max(KEPT))


def propose(count: int, importance: Sequence[float], first: int) -> list[list[int]]:
    """Sets of `count` layers from layer `first` on: the deepest, and those that keep important ones among them."""
    num_layers = len(importance)
    found: list[list[int]] = []
    for kept in KEPT:
        deep = range(max(num_layers - count - kept, first), num_layers)
        if len(deep) < count:
            continue
        keep = sorted(deep, key=lambda layer: (-importance[layer], layer))[: len(deep) - count]
        pruned = [layer for layer in deep if layer not in keep]
        if pruned not in found:
            found.append(pruned)
    return found
