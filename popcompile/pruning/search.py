"""Choose the layers that prefill skips by what skipping them costs on held-out text.

A set grows from the last layer towards the first ones by a layer at a time: each layer is tried on top of the set so
far, calibrated in closed form and measured, and it stays in prefill for now if skipping it costs more than a share of
the budget. After several such layers in a row, and at the end, the cheapest of all that were kept is skipped all the
same, as long as the budget allows. As a rule a layer costs more the larger the set is, so layers that cost least when
they were tried are tried again, until the cheapest is one that was tried on the set as it is.

So a few layers that do what the deep ones below them do not, such as copying from far back, are kept, and shallower
ones are skipped in their place: with the calibrated bypass a kept layer in the middle reads nearly what it did.
Refinement, which takes longer, is for the largest sets, where they are over the budget without it.

The longer a prompt, the more of its answers are lost, so the answers that decide stand in prompts of the length that
the choice is for. A smaller window of tokens that take the whole model is faster and loses more: it is tried on what
was chosen, where it gains enough for such prompts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from popcompile.package.report import Loss, format_layers
from popcompile.pruning.device import CPU
from popcompile.pruning.held_out import HeldOutKinds
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.refinement import Answers, refine
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.steps import COMPUTED, Steps

#: the share of layers that `auto` prunes at most
MOST = 0.6
#: how many of the deep layers `auto` may keep in that
_KEPT = 4
#: the share of the budget that skipping a layer may take; and after how many in a row that take more one is skipped
_STEP, _PATIENCE = 0.25, 4
#: rows of text to calibrate on while a set grows
_FEW_ROWS = 40
#: what refinement leaves of a loss at best: it is tried on sets that would keep to the budget then
_REFINED = 0.7
#: how many times sooner the prefill has to be for a smaller window to be taken: it costs quality within the budget
_WORTH = 1.05
#: what rounding alone does to a loss
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Budget:
    """The loss that is allowed: KL in nats, of a first token, of those after it and of answers that stand in the prompt
    each, and perplexity over the whole model's, on text and on prompts with images. None: any.
    """

    max_kl: float | None = None
    max_ppl_ratio: float | None = None

    def spent(self, loss: Loss) -> float:
        """The share of the budget that a loss takes; above 1 it is overspent."""
        shares = [0.0]
        if self.max_kl is not None:
            shares.append(_share(loss.worst_kl, self.max_kl))
        if self.max_ppl_ratio is not None:
            shares.append(_share(loss.worst_ppl_ratio - 1, self.max_ppl_ratio - 1))
        return max(shares)

    def widened(self, factor: float) -> Budget:
        """So many times the loss."""
        return Budget(
            max_kl=None if self.max_kl is None else self.max_kl * factor,
            max_ppl_ratio=None if self.max_ppl_ratio is None else 1 + (self.max_ppl_ratio - 1) * factor,
        )

    def allows(self, loss: Loss) -> bool:
        return self.spent(loss) <= 1

    @property
    def highest_kl(self) -> float:
        """The KL in nats above which no loss is allowed."""
        return math.inf if self.max_kl is None else max(self.max_kl, _ROUNDING)


def _share(loss: float, allowed: float) -> float:
    if loss <= _ROUNDING:
        return 0.0
    return loss / allowed if allowed > 0 else float("inf")


@dataclass(frozen=True)
class Candidate:
    """A measured set of pruned layers. refined: its maps are, by gradients.

    window: tokens at a prompt's end that take the whole model.
    """

    pruned: list[int]
    loss: Loss
    refined: bool = False
    window: int = 1


#: what maps are made of: some of the text or all of it, in closed form, or refined by gradients
_Origin = Literal["some", "all", "refined"]
#: how many times sooner than the whole model's a prefill is that skips these layers, with this window
Speedup = Callable[[list[int], int], float]


class Search:
    """Measures sets of layers; `measured` has all of them, in order."""

    def __init__(
        self,
        states: HiddenStates | None,
        held_out: HeldOutKinds,
        progress: Callable[[str, int, int], Any],
        *,
        answers: Callable[[], Answers | None] = lambda: None,
        steps: int = 0,
        seed: int = 0,
        windows: Sequence[int] = (),
        speedup: Speedup | None = None,
        kept: Steps = COMPUTED,
    ) -> None:
        """states: text to calibrate on; None: the layers' own projections. answers, steps, seed: of refinement.
        windows: smaller ones than held_out's that `within` may choose, by what `speedup` predicts. kept: maps of
        all the text, and losses.
        """
        self._states, self._held_out = states, held_out
        self._progress, self._answers, self._steps, self._seed = progress, answers, steps, seed
        self._windows, self._speedup, self._kept = windows, speedup, kept
        self.num_layers = held_out.model.num_layers
        self.measured: list[Candidate] = []
        self._final: dict[tuple[int, ...], _Maps] = {}

    def measure(self, pruned: list[int], window: int | None = None, limit: float = math.inf) -> Candidate:
        """The set with maps in closed form, of a part of the text. window: by default held_out's. limit: the KL above
        which it need not be known.
        """
        return self._measured(pruned, "some", lambda: self._of_some_text(pruned), window, limit)

    def finish(
        self, pruned: list[int], window: int | None = None, refinable: Callable[[Loss], bool] = lambda loss: True
    ) -> Candidate:
        """The set with its final maps: of all the text, and refined, if that helps.

        refinable: whether a loss in closed form is one that refinement is worth its time for: it takes minutes.
        """
        if (known := self._final.get(tuple(pruned))) is not None:
            return self._measured(pruned, known.origin, lambda: known.maps, window)
        plain = self._of_all_text(pruned)
        self._final[tuple(pruned)] = _Maps(plain, "all")
        finished = self._measured(pruned, "all", lambda: plain, window)
        if self._states is None or self._steps == 0 or not plain.projections or not refinable(finished.loss):
            return finished
        maps = self._refined(self._states, pruned, plain)
        better = self._measured(pruned, "refined", lambda: maps, window)
        if better.loss.worst_kl >= finished.loss.worst_kl:
            self.measured.remove(better)
            return finished
        self._final[tuple(pruned)] = _Maps(maps, "refined")
        return better

    def _of_some_text(self, pruned: list[int]) -> Calibration:
        """Maps in closed form: a set that grows is measured with these."""
        if self._states is None:
            return Calibration()
        few = self._states.thinned(max(1, len(self._states.rows) // _FEW_ROWS))
        return calibrate(few, pruned, products=torch.float32)

    def _of_all_text(self, pruned: list[int]) -> Calibration:
        """Maps in closed form."""
        if (states := self._states) is None:
            return Calibration()
        return self._kept_maps(f"maps_all_{format_layers(pruned)}", lambda: calibrate(states, pruned))

    def _refined(self, states: HiddenStates, pruned: list[int], start: Calibration) -> Calibration:
        def compute() -> Calibration:
            return refine(
                states, pruned, start, answers=self._answers(), steps=self._steps, seed=self._seed,
                progress=lambda *n: self._progress("refine", *n),
            )  # fmt: skip

        return self._kept_maps(f"maps_refined_{format_layers(pruned)}", compute)

    def _kept_maps(self, name: str, compute: Callable[[], Calibration]) -> Calibration:
        """The maps of this name, where the model is; kept on the CPU, so that any device can go on with them."""
        kept = self._kept.tensors(name, lambda: compute().to(CPU).constants())
        return Calibration.of(kept).to(self._held_out.model.device)

    def final(self, candidate: Candidate) -> Calibration:
        """The maps of a finished candidate."""
        return self._final[tuple(candidate.pruned)].maps

    def _measured(
        self,
        pruned: list[int],
        origin: _Origin,
        maps: Callable[[], Calibration],
        window: int | None,
        limit: float = math.inf,
    ) -> Candidate:
        """It takes the place of the same set's, measured with other maps of the same kind."""
        held_out = self._held_out if window is None else self._held_out.at(window)
        name = f"loss_{origin}_{format_layers(pruned)}_window_{held_out.window}_limit_{limit:g}"
        loss = self._kept.loss(name, lambda: held_out.measure(pruned, maps(), limit))
        found = Candidate(pruned, loss, origin == "refined", held_out.window)
        same = (found.pruned, found.refined, found.window)
        self.measured = [c for c in self.measured if (c.pruned, c.refined, c.window) != same]
        self.measured.append(found)
        return found

    def best(self, count: int, scale: Budget) -> Candidate:
        """`count` layers; finished. scale: the budget whose shares decide which layers are kept."""
        return self.finish(self._grow(scale, Budget(), count, patience=self.num_layers)[-1].pruned)

    def within(self, budget: Budget) -> Candidate:
        """The most layers whose loss is within the budget, else the last layer alone; finished."""
        refines = self._states is not None and self._steps > 0
        within_reach = budget.widened(1 / _REFINED) if refines else budget

        def refinable(loss: Loss) -> bool:
            return within_reach.allows(loss) and not budget.allows(loss)

        most = min(largest_count(self.num_layers), self.num_layers - self._held_out.first)
        sets = self._grow(budget, within_reach, most, _PATIENCE)
        left = None
        for count in range(len(sets) - 1, 0, -1):
            spent = budget.spent(sets[count].loss)
            if left is not None and spent * left > 1:
                continue
            finished = self.finish(sets[count].pruned, refinable=refinable)
            remains = budget.spent(finished.loss)
            if budget.allows(finished.loss):
                return self._with_smaller_window(finished, sets[: count + 1], budget, refinable)
            if finished.refined:
                left = remains / max(spent, _ROUNDING)  # of the others' as well, more or less: not each is refined
        return self.finish(sets[0].pruned, refinable=refinable)

    def _with_smaller_window(
        self, finished: Candidate, sets: Sequence[Candidate], budget: Budget, refinable: Callable[[Loss], bool]
    ) -> Candidate:
        """The fastest of these sets with a smaller window, finished, that keeps to the budget and is worth it; else
        `finished`, the last of them.
        """
        if self._speedup is None:
            return finished
        least = _WORTH * self._speedup(finished.pruned, finished.window)
        pairs = [(self._speedup(c.pruned, window), c.pruned, window) for c in sets[1:] for window in self._windows]
        for speedup, pruned, window in sorted(pairs, reverse=True):
            if speedup < least:
                break
            if pruned != finished.pruned and not budget.allows(self.measure(pruned, window, budget.highest_kl).loss):
                continue
            smaller = self.finish(pruned, window, refinable)
            if budget.allows(smaller.loss):
                return smaller
        return finished

    def _grow(self, scale: Budget, limit: Budget, most: int, patience: int) -> list[Candidate]:
        """Sets of 1 to at most `most` layers, each the one before with one more.

        scale: the budget whose shares decide whether a layer is kept. limit: the one that every set keeps to.
        """
        sets = [self.measure([self.num_layers - 1])]
        queue = deque(range(self.num_layers - 2, self._held_out.first - 1, -1))
        count = len(queue)
        kept: list[_Tried] = []
        in_a_row = 0

        def try_layer(layer: int) -> _Tried:
            before = sets[-1]
            candidate = self.measure(sorted([layer, *before.pruned]), limit=limit.highest_kl)
            cost = scale.spent(candidate.loss) - scale.spent(before.loss)
            return _Tried(layer, candidate, cost, limit.allows(candidate.loss))

        while len(sets) < most and (queue or kept):
            if queue and in_a_row < patience:
                self._progress("choose", count - len(queue), count)
                tried = try_layer(queue.popleft())
                if tried.cost > _STEP or not tried.allowed:
                    kept.append(tried)
                    in_a_row += 1
                    continue
            else:
                tried = min(kept, key=lambda t: t.cost)
                if not tried.allowed:
                    break
                kept.remove(tried)
                if len(tried.candidate.pruned) <= len(sets):  # it was tried on a smaller set
                    kept.append(try_layer(tried.layer))
                    continue
            sets.append(tried.candidate)
            in_a_row = 0
        return sets


class _Maps(NamedTuple):
    """What takes the place of pruned layers."""

    maps: Calibration
    origin: _Origin


class _Tried(NamedTuple):
    """A layer on top of a set. cost: the share of the budget that it adds. allowed: the set keeps to the limit."""

    layer: int
    candidate: Candidate
    cost: float
    allowed: bool


def largest_count(num_layers: int) -> int:
    """How many layers `auto` prunes at most."""
    return max(1, int(num_layers * MOST))


def first_candidate(num_layers: int, count: int) -> int:
    """The first layer that may be pruned where `count` are, at most. Layer 0 is always kept, if it can be."""
    return max(min(1, num_layers - count), num_layers - count - max(2, min(_KEPT, count // 2)))
