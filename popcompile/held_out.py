"""Measure what a pruned prefill costs, before it is compiled: on text that was held out of calibration.

A text is a prompt and a continuation. Besides the prompt's end, the window of tokens that take the whole model, and the
continuation, windows that end earlier in the prompt are taken for a prompt's end too: each attends to the pruned
prefill of the tokens before it and to itself, as it would were it the last. That gives several first tokens per text.

    context    prompt tokens but those of the window: the pruned prefill's hidden states
    tail       the window and the continuation, teacher-forced from there on, and the probes: every layer, in full
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from popcompile.calibration import Calibration
from popcompile.layerwise import LayerwiseModel, Tokens
from popcompile.predictions import Comparison, compare
from popcompile.pruned_prefill import Prompts, last_hidden_state

#: rows that are run together
_BATCH = 4
#: probes per row, at most; the tokens of their windows, unless these are two probes; and of the shortest one's context
_PROBES, _PROBED_TOKENS, _EARLIEST = 32, 128, 32


@dataclass(frozen=True)
class Loss:
    """What pruning costs against the whole model; KL(whole || pruned) in nats.

    first_token_kl, its standard error over rows (NaN for one row), first_token_agreement: of tokens after a prompt.
    kl, agreement, ppl_ratio: of the continuation's tokens, teacher-forced. Agreement is that of the likeliest token.
    """

    first_token_kl: float
    first_token_kl_error: float
    first_token_agreement: float
    kl: float
    agreement: float
    ppl_ratio: float


class HeldOut:
    """Rows of tokens [N, T], and the whole model's hidden states before layer `first` and at the end.

    Layers before `first` are never pruned. prompt: tokens of a row that are its prompt; the others continue it.
    window: tokens at a prompt's end that take the whole model, fewer than it has.
    """

    def __init__(
        self, model: LayerwiseModel, rows: Tensor, first: int, prompt: int, seed: int, window: int = 1
    ) -> None:
        assert 0 < window < prompt
        self.model, self.rows, self.first, self.window = model, rows, first, window
        self.context = prompt - window
        self.continued = rows.shape[1] - prompt
        random = torch.Generator().manual_seed(seed)
        ends = torch.stack([self._probes(random) for _ in rows])
        continuation = torch.arange(self.context, rows.shape[1] - 1).expand(len(rows), -1)
        back = torch.arange(window).flip(0)
        probes = (ends[:, :, None] - back).flatten(1)
        self._positions = torch.cat((continuation, probes), 1)
        self._begins = torch.cat(
            (torch.full_like(continuation, self.context), (ends - window + 1).repeat_interleave(window, 1)), 1
        )
        self._ids = rows.gather(1, self._positions)
        #: in the tail: the boundary token and the continuation, and the probes' last tokens
        self._measured = torch.cat(
            (
                torch.arange(window - 1, continuation.shape[1]),
                torch.arange(ends.shape[1]) * window + continuation.shape[1] + window - 1,
            )
        )
        self._next = rows.gather(1, self._positions[:, self._measured] + 1)
        entering, final = [], []
        for batch in self._batches():
            prompts = self._prompts(batch)
            x = model.embed(prompts.together)
            for layer in range(model.num_layers):
                if layer == first:
                    entering.append(x)
                x = model.layer(layer, x, prompts.together, prompts.visible)
            final.append(x[:, self.context :][:, self._measured])
        self._entering, self._final = torch.cat(entering), torch.cat(final)

    def _probes(self, random: torch.Generator) -> Tensor:
        """Positions of tokens of the prompt that a probe's window ends with, in one row."""
        count = min(_PROBES, max(2, _PROBED_TOKENS // self.window))
        last = self.context + self.window - 1  # the boundary token
        earliest = self.window - 1 + min(_EARLIEST, self.context // 2)
        return torch.randperm(last - earliest, generator=random)[:count] + earliest

    def measure(self, pruned: list[int], calibration: Calibration) -> Loss:
        """The loss of pruning these layers, with the calibrated maps or, where there is none, the layers' own."""
        parts = []
        for batch in self._batches():
            prompts, x = self._prompts(batch), self._entering[batch]
            entering = x[:, : self.context], x[:, self.context :]
            y = last_hidden_state(self.model, prompts, entering, self.first, pruned, calibration)
            parts.append(self._compare(batch, prompts.tail, y[:, self._measured]))
        kl, whole, ours, agreement = map(torch.cat, zip(*parts, strict=True))
        after = slice(0, self.continued)
        first = torch.cat((kl[:, :1], kl[:, self.continued :]), 1).mean(1)
        first_agreement = torch.cat((agreement[:, :1], agreement[:, self.continued :]), 1).mean()
        return Loss(
            first_token_kl=float(first.mean()),
            first_token_kl_error=float(first.std() / len(first) ** 0.5) if len(first) > 1 else math.nan,
            first_token_agreement=float(first_agreement),
            kl=float(kl[:, after].mean()),
            agreement=float(agreement[:, after].mean()),
            ppl_ratio=float((ours - whole)[:, after].mean().exp()),
        )

    def _compare(self, batch: slice, tokens: Tokens, y: Tensor) -> Comparison:
        """The whole model's predictions with those from the last hidden state y [B, measured, hidden]: [B, measured].

        A row at a time bounds the logits.
        """
        rows = []
        for final, ours, following in zip(self._final[batch], y, self._next[batch], strict=True):
            whole, pruned = (self.model.logits(h[None], tokens)[0] for h in (final, ours))
            rows.append(compare(whole, pruned, following))
        return Comparison(*map(torch.stack, zip(*rows, strict=True)))

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.rows), _BATCH):
            yield slice(start, min(start + _BATCH, len(self.rows)))

    def _prompts(self, batch: slice) -> Prompts:
        context = self.rows[batch, : self.context]
        return Prompts.of(self.model, context, self._ids[batch], self._positions[batch], self._begins[batch])
