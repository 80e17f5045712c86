"""Measure what a pruned prefill costs, before it is compiled: on text that was held out of calibration.

A text is a prompt and a continuation. Besides the boundary token and the continuation, some earlier tokens of the
prompt are taken as boundary tokens too: each attends to the pruned prefill of the tokens before it and to itself, as it
would were it the last. That gives many first tokens per text, for the price of as many tokens.

    context    prompt tokens but the last: the pruned prefill's hidden states
    tail       the continuation, teacher-forced from the boundary token on, and the probes: every layer, in full
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from popcompile.calibration import Calibration
from popcompile.layerwise import Keys, LayerwiseModel, Tokens
from popcompile.passes.graph import runs
from popcompile.predictions import Comparison, compare

#: rows that are run together
_BATCH = 4
#: probes per row, and the position of the earliest, in tokens
_PROBES, _EARLIEST = 32, 32


@dataclass(frozen=True)
class Loss:
    """What pruning costs against the whole model; KL(whole || pruned) in nats.

    first_token_kl and its standard error over rows, first_token_agreement: of the first token after a prompt.
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
    """

    def __init__(self, model: LayerwiseModel, rows: Tensor, first: int, prompt: int, seed: int) -> None:
        self.model, self.rows, self.first = model, rows, first
        self.context = prompt - 1
        self.continued = rows.shape[1] - prompt
        random = torch.Generator().manual_seed(seed)
        earliest = min(_EARLIEST, self.context // 2)
        probes = torch.stack(
            [torch.randperm(self.context - earliest, generator=random)[:_PROBES] + earliest for _ in rows]
        )
        continuation = torch.arange(self.context, rows.shape[1] - 1).expand(len(rows), -1)
        self._positions = torch.cat((continuation, probes), 1)
        self._ids = rows.gather(1, self._positions)
        self._next = rows.gather(1, self._positions + 1)
        entering, final = [], []
        for batch in self._batches():
            context, tail, together = self._tokens(batch)
            visible = self._visible(batch)
            x = torch.cat((model.embed(context), model.embed(tail)), 1)
            for layer in range(model.num_layers):
                if layer == first:
                    entering.append(x)
                x = model.layer(layer, x, together, visible)
            final.append(x[:, self.context :])
        self._entering, self._final = torch.cat(entering), torch.cat(final)

    def measure(self, pruned: list[int], calibration: Calibration) -> Loss:
        """The loss of pruning these layers, with the calibrated maps or, where there is none, the layers' own."""
        parts = [self._compare(batch, self._run(batch, pruned, calibration)) for batch in self._batches()]
        kl, whole, ours, agreement = map(torch.cat, zip(*parts, strict=True))
        after = slice(0, self.continued)
        first = torch.cat((kl[:, :1], kl[:, self.continued :]), 1).mean(1)
        first_agreement = torch.cat((agreement[:, :1], agreement[:, self.continued :]), 1).mean()
        return Loss(
            first_token_kl=float(first.mean()),
            first_token_kl_error=float(first.std() / len(first) ** 0.5),
            first_token_agreement=float(first_agreement),
            kl=float(kl[:, after].mean()),
            agreement=float(agreement[:, after].mean()),
            ppl_ratio=float((ours - whole)[:, after].mean().exp()),
        )

    def _run(self, batch: slice, pruned: list[int], calibration: Calibration) -> Tensor:
        """The tail's last hidden state [B, tail, hidden], after a pruned prefill of the context."""
        model, ends = self.model, dict(runs(pruned))
        context, tail, together = self._tokens(batch)
        visible = self._visible(batch)
        entering = self._entering[batch]
        x, y = entering[:, : self.context], entering[:, self.context :]
        begin = -1
        for layer in range(self.first, model.num_layers):
            if layer not in pruned:
                both = model.layer(layer, torch.cat((x, y), 1), together, visible)
                x, y = both[:, : self.context], both[:, self.context :]
                continue
            begin = layer if layer in ends else begin
            entries = model.cache_entries(layer, *self._projected(layer, x, context, calibration), context)
            keys = Keys(*entries, context.positions)
            y = model.layer(layer, y, tail, visible[:, self.context :], keys)
            if layer == ends[begin] and begin in calibration.bypasses:
                x = x + calibration.bypasses[begin](x)
        return y

    def _projected(self, layer: int, x: Tensor, tokens: Tokens, calibration: Calibration) -> tuple[Tensor, Tensor]:
        if layer not in calibration.projections:
            return self.model.project(layer, x, tokens)
        key, value = calibration.projections[layer](x).chunk(2, -1)
        return key, value

    def _compare(self, batch: slice, y: Tensor) -> Comparison:
        """The whole model's predictions with those from the tail's last hidden state y [B, tail, hidden]: [B, tail].

        A row at a time bounds the logits.
        """
        rows = []
        tokens = self._tokens(batch)[1]
        for final, ours, following in zip(self._final[batch], y, self._next[batch], strict=True):
            whole, pruned = (self.model.logits(h[None], tokens)[0] for h in (final, ours))
            rows.append(compare(whole, pruned, following))
        return Comparison(*map(torch.stack, zip(*rows, strict=True)))

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.rows), _BATCH):
            yield slice(start, min(start + _BATCH, len(self.rows)))

    def _tokens(self, batch: slice) -> tuple[Tokens, Tokens, Tokens]:
        """Context, tail, and both one after the other."""
        ids, tail = self.rows[batch, : self.context], self._ids[batch]
        positions = torch.arange(self.context).expand(len(ids), -1)
        together = torch.cat((positions, self._positions[batch]), 1)
        model = self.model
        return (
            model.tokens(ids, positions),
            model.tokens(tail, self._positions[batch]),
            model.tokens(torch.cat((ids, tail), 1), together),
        )

    def _visible(self, batch: slice) -> Tensor:
        """[B, context + tail, context + tail]: which tokens each may attend to."""
        tail = self._positions[batch]
        count, size = self.context, self.context + tail.shape[1]
        visible = torch.eye(size, dtype=torch.bool).repeat(len(tail), 1, 1)
        visible[:, :count, :count] = torch.ones(count, count, dtype=torch.bool).tril()
        visible[:, count:, :count] = torch.arange(count) < tail[:, :, None]
        end = count + self.continued
        visible[:, count:end, count:end] = torch.ones(self.continued, self.continued, dtype=torch.bool).tril()
        return visible
