"""Text sampled from the model itself, so that calibration and analysis need no data set.

Every row starts with a token of its own and goes on with what the model finds likely (temperature 1). In a model's own
text all of its training text is represented, which transfers better than one real domain (README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.passes import Program, ops
from popcompile.passes.graph import find, shape_of
from popcompile.pruning.execution import NO_NUMBERS, Reader, call_reference, device_of, fast_products, materialise
from popcompile.pruning.rows import TOKEN_IDS, DecoderInputs, Rows, decoder_inputs

#: tokens of the vocabulary whose probabilities are summed before one is drawn
_BLOCK = 512


@torch.inference_mode()
def sample(
    model: fx.GraphModule,
    rows: Rows,
    given: Sequence[int],
    *,
    seed: int,
    inputs: DecoderInputs = TOKEN_IDS,
    temperatures: Sequence[float] | None = None,
    batch: int = 128,
    progress: Callable[[int, int], Any] | None = None,
) -> Rows:
    """The rows with drawn tokens behind the first given[i] of row i.

    model: the canonical graph with real weights (execution.materialise). inputs: what it is given of tokens.
    temperatures: one per row, default 1. progress(done, total) counts decode steps.
    Raises PopcompileError where the model's probabilities are no numbers.
    """
    run = call_reference(model, {ops.append_kv: _write_in_place, ops.attention: _attend_to_all})
    random = torch.Generator().manual_seed(seed)
    first = 1 if rows.images is None else min(given)  # tokens of an image may see one another: they are run at once
    total, done = -(-len(rows) // batch) * (rows.length - first), 0
    device, counts = device_of(model), torch.tensor(given)
    heat = torch.tensor(temperatures, device=device)[:, None] if temperatures else None
    sampled = []
    for begin in range(0, len(rows), batch):
        those = slice(begin, begin + batch)
        part = _Batch(run, inputs, rows[those], _cache_shapes(model, rows.length), device)
        ids = part.rows.ids
        for n in range(first, rows.length):
            logits = part.logits_at_once(n) if n == first > 1 else part.logits(slice(None), range(n - 1, n))
            drawn = _draw(logits if heat is None else logits / heat[those], random).cpu()
            ids[:, n] = torch.where(n < counts[those], ids[:, n], drawn)
            done += 1
            if progress:
                progress(done, total)
        sampled.append(ids)
    return replace(rows, ids=torch.cat(sampled))


class _Batch:
    """Rows that are drawn together, and their cache. rows: with the tokens so far."""

    def __init__(
        self,
        run: fx.GraphModule,
        inputs: DecoderInputs,
        rows: Rows,
        shapes: Sequence[tuple[int, int, int]],
        device: torch.device,
    ) -> None:
        self._run, self._inputs, self._device = run, inputs, device
        self.rows = replace(rows, ids=rows.ids.clone())
        self._cache = [torch.zeros(len(rows), *shape, dtype=torch.float32, device=device) for shape in shapes]

    def logits(self, chosen: slice, slots: range) -> Tensor:
        """Of the last of these tokens of some rows, [rows, vocabulary]; the cache has those before them."""
        rows = self.rows[chosen]
        inputs = self._inputs.of(rows, torch.tensor(slots).expand(len(rows), -1))
        tokens, *others = (each.to(self._device) for each in inputs)
        mask = torch.ones(len(rows), slots.stop, dtype=torch.int64, device=self._device)
        return self._run(tokens, mask, *others, *(c[chosen, :, : slots.stop] for c in self._cache))[0][:, -1]

    def logits_at_once(self, count: int) -> Tensor:
        """Of the last of the first `count` tokens, all run at once; a row at a time, which bounds the logits."""
        return torch.cat([self.logits(slice(i, i + 1), range(count)) for i in range(len(self.rows))])


def sample_behind(
    program: Program,
    read: Reader,
    rows: Rows,
    given: Sequence[int],
    seed: int,
    progress: Callable[[int, int], Any] | None = None,
) -> Rows:
    """`sample`, of a canonical program."""
    model, inputs = materialise(program.graphs["model"], program, read), decoder_inputs(program, read)
    with fast_products():
        return sample(model, rows, given, seed=seed, inputs=inputs, progress=progress)


def begun(starts: Sequence[Tensor], length: int) -> tuple[Rows, list[int]]:
    """Rows of `length` tokens that begin with these, and how many tokens of each row are given: for `sample`."""
    ids = torch.zeros(len(starts), length, dtype=torch.int64)
    for row, start in zip(ids, starts, strict=True):
        row[: len(start)] = start
    return Rows(ids), [len(start) for start in starts]


def _draw(logits: Tensor, random: torch.Generator) -> Tensor:
    """A token per row of logits [B, vocabulary], by its probability.

    Where a random number falls is looked up among the sums of blocks, and then in one block: to cumulate over all of a
    large vocabulary takes longer than the softmax, and torch.multinomial ten times as long.
    """
    blocks = pad(logits.softmax(-1), (0, -logits.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    cumulated = blocks.sum(-1).cumsum(-1)
    if torch.isnan(cumulated[:, -1]).any():
        raise PopcompileError(f"the model cannot be sampled from: {NO_NUMBERS}")
    threshold = torch.rand(len(logits), 1, generator=random).to(logits.device) * cumulated[:, -1:]
    block = torch.searchsorted(cumulated, threshold)
    rest = threshold - pad(cumulated, (1, 0)).gather(1, block)
    within = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].cumsum(-1)
    return (block * _BLOCK + torch.searchsorted(within, rest.minimum(within[:, -1:])))[:, 0]


def _write_in_place(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """append_kv for a cache whose last slots are still empty: all rows are equally long."""
    cache[:, :, -new.shape[2] :] = new
    return cache


def _attend_to_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    *,
    ends: Tensor | None = None,
) -> Tensor:
    """attention to a cache without slack. Of one token per row, by groups of heads: no copy of a key per head.

    In plain fp32: keys get longer with every token, and oneDNN would keep a bf16 kernel for each length.
    """
    if query.shape[2] > 1:
        attend = ops.REFERENCE[ops.attention]
        return attend(query, key, value, positions, scale, window, softcap, sinks, ends=ends)
    if window > 0:
        key, value = key[:, :, -window:], value[:, :, -window:]
    grouped = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
    with fast_products(False):
        scores = grouped @ key.transpose(2, 3) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            column = sinks.view(1, *scores.shape[1:3], 1).expand(len(scores), -1, -1, -1)
            return (torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ value).flatten(1, 2)[:, :, None]
        return (scores.softmax(-1) @ value).flatten(1, 2)[:, :, None]


def _cache_shapes(model: fx.GraphModule, slots: int) -> list[tuple[int, int, int]]:
    """[kv_heads, slots, head_size] of every key and value, in the order of the graph's inputs."""
    return [(int(shape_of(n)[1]), slots, int(shape_of(n)[3])) for n in find(model, op=ops.append_kv)]


def random_starts(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, count: int, seed: int) -> list[Tensor]:
    """`count` beginnings of texts for `sample`: BOS where the tokenizer adds it by itself, and one random token.

    The random token is neither special nor added, so that no text begins in the middle of a chat template. Without a
    tokenizer it is any of `vocab_size`.
    """
    first: list[int] = []
    ordinary = torch.arange(vocab_size)
    if tokenizer is not None:
        bos, ids = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
        if bos is not None and ids[:1] == [bos]:
            first = [int(bos)]
        known = torch.ones(min(vocab_size, len(tokenizer)), dtype=torch.bool)
        for token in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            known[token : token + 1] = False
        ordinary = known.nonzero()[:, 0]
    chosen = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(seed))
    return [torch.tensor([*first, int(ordinary[i])]) for i in chosen]
