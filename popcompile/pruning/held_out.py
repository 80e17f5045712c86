"""Measure what a pruned prefill costs, before it is compiled: on text that was held out of calibration.

A text is a prompt and a continuation. Besides the prompt's end, the window of tokens that take the whole model, and the
continuation, windows that end earlier in the prompt are taken for a prompt's end too: each attends to the pruned
prefill of the tokens before it and to itself, as it would were it the last. That gives several first tokens per text.

    context    prompt tokens but those of the window: the pruned prefill's hidden states
    tail       the window and the continuation, teacher-forced from there on, and the probes: every layer, in full

Of texts whose answers stand in the prompt (text/lists.py) only the answers' tokens count.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from popcompile.evaluation.metrics import Comparison, compare
from popcompile.package.report import Loss
from popcompile.pruning.hidden_states import HiddenStates, at_positions
from popcompile.pruning.layerwise import LayerwiseModel, Tokens
from popcompile.pruning.pruned_prefill import Prompts, last_hidden_state
from popcompile.pruning.regression import Calibration
from popcompile.pruning.rows import AskedRows, Rows

#: rows that are run together, and their tokens, unless it is one row
_BATCH, _BATCH_TOKENS = 4, 2048
#: probes per row, at most; the tokens of their windows, unless these are two probes; and of the shortest one's context
_PROBES, _PROBED_TOKENS, _EARLIEST = 32, 128, 32


class HeldOut:
    """Rows of tokens, and the whole model's hidden states before each layer from `first` on and at the end.

    Layers before `first` are never pruned. prompt: tokens of a row that are its prompt; the others continue it.
    window: tokens at a prompt's end that take the whole model, fewer than it has. retrieval: texts whose answers stand
    in the prompt, their first `asked_tokens`, by default as many as a row's. folder: where files of hidden states may
    be, by default that of temporary files.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        rows: Rows,
        first: int,
        prompt: int,
        seed: int,
        window: int = 1,
        retrieval: AskedRows | None = None,
        asked_tokens: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self._states, self._prompt, self._seed = HiddenStates(model, rows, first, folder), prompt, seed
        self._asked = None
        if retrieval is not None:
            states = HiddenStates(model, retrieval.rows, first, folder)
            self._asked = _Asked(states, retrieval.answers, asked_tokens or prompt)
        self._place(window)

    def at(self, window: int) -> HeldOut:
        """The same text, with another window."""
        other = copy.copy(self)
        other._place(window)
        return other

    def _place(self, window: int) -> None:
        assert 0 < window < self._prompt
        self.window = window
        self._retrieval = self._asked and _HeldOutRetrieval(self._asked, window)
        rows, context = self._states.rows, self._prompt - window
        self._continued = rows.length - self._prompt
        random = torch.Generator().manual_seed(self._seed)
        earliest = window - 1 + min(_EARLIEST, context // 2)
        probes = min(_PROBES, max(2, _PROBED_TOKENS // window))
        ends = rows.draw_slots(earliest, self._prompt - 1, probes, random)
        continuation = rows.slots[:, context:-1]
        probed = (ends[:, :, None] - torch.arange(window).flip(0)).flatten(1)
        begins = (torch.full_like(continuation, context), (ends - window + 1).repeat_interleave(window, 1))
        #: in the tail: the boundary token and the continuation, and the probes' last tokens
        measured = (
            torch.arange(window - 1, continuation.shape[1]),
            torch.arange(ends.shape[1]) * window + continuation.shape[1] + window - 1,
        )
        self._tails = _Tails(
            self._states, context, torch.cat((continuation, probed), 1), torch.cat(begins, 1),
            torch.cat(measured).expand(len(rows), -1),
        )  # fmt: skip

    @property
    def model(self) -> LayerwiseModel:
        return self._states.model

    @property
    def first(self) -> int:
        return self._states.first

    def measure(self, pruned: list[int], calibration: Calibration, limit: float = math.inf) -> Loss:
        """The loss of pruning these layers, with the calibrated maps or, where there is none, the layers' own.

        limit: a KL in nats; what is left of the text is not run once the loss is above it for certain.
        """
        kl, whole, ours, agreement, *_ = self._tails.compare(pruned, calibration)
        after, later = slice(0, self._continued), slice(min(1, self._continued - 1), self._continued)
        first = torch.cat((kl[:, :1], kl[:, self._continued :]), 1).mean(1)
        first_agreement = torch.cat((agreement[:, :1], agreement[:, self._continued :]), 1).mean()
        loss = Loss(
            first_token_kl=float(first.mean()),
            first_token_kl_error=_standard_error(first),
            first_token_agreement=float(first_agreement),
            kl=float(kl[:, later].mean()),
            agreement=float(agreement[:, after].mean()),
            ppl_ratio=float((ours - whole)[:, after].mean().exp()),
        )
        if self._retrieval is None:
            return loss
        if loss.worst_kl > limit:
            return replace(loss, at_least=True)
        return self._retrieval.add_to(loss, pruned, calibration, limit)


class HeldOutKinds:
    """Text, and prompts with images where the model takes these: what a set of layers costs on both."""

    def __init__(self, text: HeldOut, images: HeldOut | None = None) -> None:
        self._text, self._images = text, images
        self.model, self.first, self.window = text.model, text.first, text.window

    def at(self, window: int) -> HeldOutKinds:
        """The same prompts, with another window."""
        return HeldOutKinds(self._text.at(window), None if self._images is None else self._images.at(window))

    def measure(self, pruned: list[int], calibration: Calibration, limit: float = math.inf) -> Loss:
        """As HeldOut does; prompts with images are not run where text alone is over the limit."""
        loss = self._text.measure(pruned, calibration, limit)
        if self._images is None:
            return loss
        if loss.worst_kl > limit:
            return replace(loss, at_least=True)
        return replace(loss, images=self._images.measure(pruned, calibration, limit))


class _Asked(NamedTuple):
    """Rows of tokens, which of their tokens are parts of answers [N, T], and the tokens of their prompts."""

    states: HiddenStates
    answers: Tensor
    prompt: int


class _HeldOutRetrieval:
    """Texts whose answers stand in them, as HeldOut has rows; what is asked for from `prompt` on is measured."""

    def __init__(self, text: _Asked, window: int) -> None:
        states, answers, prompt = text
        rows, context = states.rows, prompt - window
        positions = rows.slots[:, context:-1]
        asked = answers[:, context + 1 :] & (positions + 1 >= prompt)
        count = int(asked.sum(1).min())
        assert count > 0
        measured = asked.int().topk(count, 1).indices.sort(1).values
        self._tails = _Tails(states, context, positions, torch.full_like(positions, context), measured)
        #: rows, those first that lost most, and the answers that the whole model finds, of which losses are the mean
        self._order, self._found = torch.arange(len(rows)), math.inf

    def add_to(self, loss: Loss, pruned: list[int], calibration: Calibration, limit: float) -> Loss:
        """The loss of pruning these layers, with what it costs here, at least where that is more than `limit`."""
        parts, lost = [], 0.0
        for part in self._tails.compared(pruned, calibration, self._order):
            parts.append(part)
            lost += float(part.kl[part.full_correct > 0].sum())
            if lost > limit * self._found:  # no KL is negative, so the other rows take nothing away
                return replace(loss, retrieval_kl=lost / self._found, at_least=True)
        compared = _joined(parts)
        found = compared.full_correct > 0
        share = float(compared.full_correct.mean())
        self._found = int(found.sum()) or math.inf
        self._order = self._order[(compared.kl * found).sum(1).argsort(descending=True)]
        if not found.any():
            return replace(loss, retrieval_found=share)
        return replace(
            loss,
            retrieval_found=share,
            retrieval_kl=float(compared.kl[found].mean()),
            retrieval_kept=float(compared.correct[found].mean()),
            retrieval_kl_error=_pooled_error(compared.kl, found),
        )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def _pooled_error(values: Tensor, chosen: Tensor) -> float | None:
    """The standard error of the mean of the chosen values [N, M]: of a ratio of sums, over rows."""
    sums, counts = (values * chosen).sum(1), chosen.sum(1)
    rows = int((counts > 0).sum())
    if rows < 2:
        return None
    off = sums - counts * (sums.sum() / counts.sum())
    return float((off.pow(2).sum() * rows / (rows - 1)).sqrt() / counts.sum())


def _joined(parts: Iterable[Comparison]) -> Comparison:
    """Of the rows of all parts."""
    return Comparison(*map(torch.cat, zip(*parts, strict=True)))


class _Tails:
    """Tails of rows, and what the whole model makes of them.

    context: tokens of a row from its beginning that tails may attend to. positions: of the tails' tokens [N, Q], and
    begins, where the block of each begins. measured: indices [N, M] of tail tokens whose predictions are compared.
    """

    def __init__(self, states: HiddenStates, context: int, positions: Tensor, begins: Tensor, measured: Tensor) -> None:
        self._states, self._context, self._positions, self._begins = states, context, positions, begins
        self._measured = measured
        at = positions.gather(1, measured)
        self._next = states.rows.ids.gather(1, at + 1)
        self._final = at_positions(states.before(states.model.num_layers), at)
        #: the whole model's logits [M, vocabulary] by row, in files
        self._whole: dict[int, Tensor] = {}

    def compare(self, pruned: list[int], calibration: Calibration) -> Comparison:
        """The whole model's predictions with those after a prefill that prunes these layers, [N, M] each."""
        return _joined(self.compared(pruned, calibration, torch.arange(len(self._next))))

    def compared(self, pruned: list[int], calibration: Calibration, order: Tensor) -> Iterator[Comparison]:
        """The same of some rows at a time, in this order."""
        begin = pruned[0] if pruned else self._states.first
        count = max(1, min(_BATCH, _BATCH_TOKENS // self._states.rows.length))
        for batch in order.split(count):
            prompts, x = self._prompts(batch), self._states.before(begin)[batch].to(self._states.model.device)
            entering = x[:, : self._context], at_positions(x, self._positions[batch])
            y = last_hidden_state(self._states.model, prompts, entering, begin, pruned, calibration)
            yield self._compare(batch, prompts.tail, at_positions(y, self._measured[batch]))
            self._states.release()

    def _compare(self, batch: Tensor, tokens: Tokens, y: Tensor) -> Comparison:
        """Of last hidden states y [B, M, hidden]. A row at a time bounds the logits."""
        rows = []
        for row, ours in zip(batch.tolist(), y, strict=True):
            pruned = self._states.model.logits(ours[None], tokens)[0]
            whole = self._whole_logits(row, tokens).to(pruned.device)
            rows.append(compare(whole, pruned, self._next[row].to(pruned.device)))
        return Comparison(*(torch.stack(part).cpu() for part in zip(*rows, strict=True)))

    def _whole_logits(self, row: int, tokens: Tokens) -> Tensor:
        """The whole model's [M, vocabulary]: computed once, for they take as long as those of a pruned prefill."""
        if row not in self._whole:
            final = self._final[row][None].to(self._states.model.device)
            logits = self._states.model.logits(final, tokens)[0]
            self._whole[row] = self._states.room(logits.shape).copy_(logits)
        return self._whole[row]

    def _prompts(self, batch: Tensor) -> Prompts:
        rows, positions = self._states.rows[batch], self._positions[batch]
        return Prompts.of(self._states.model, rows, self._context, positions, self._begins[batch])
