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
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.passes import Program, ops
from popcompile.passes.graph import find, shape_of
from popcompile.pruning.execution import NO_NUMBERS, Reader, call_reference, fast_products, materialise
from popcompile.pruning.rows import TOKEN_IDS, DecoderInputs, Rows, decoder_inputs


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
    step = call_reference(model, {ops.append_kv: _write_in_place, ops.attention: _attend_to_all})
    random = torch.Generator().manual_seed(seed)
    total, done = -(-len(rows) // batch) * (rows.length - 1), 0
    sampled = []
    for first in range(0, len(rows), batch):
        part, counts = rows[first : first + batch], torch.tensor(given[first : first + batch])
        ids = part.ids.clone()
        heat = torch.tensor((temperatures or [1.0] * len(rows))[first : first + batch])[:, None]
        cache = [torch.zeros(len(ids), *shape, dtype=torch.float32) for shape in _cache_shapes(model, rows.length)]
        for n in range(rows.length - 1):
            tokens, *others = inputs.of(replace(part, ids=ids), torch.full((len(ids), 1), n))
            mask = torch.ones(len(ids), n + 1, dtype=torch.int64)
            logits = step(tokens, mask, *others, *(c[:, :, : n + 1] for c in cache))[0]
            likely = _draw(logits[:, -1] / heat, random)
            ids[:, n + 1] = torch.where(n + 1 < counts, ids[:, n + 1], likely)
            done += 1
            if progress:
                progress(done, total)
        sampled.append(ids)
    return replace(rows, ids=torch.cat(sampled))


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
    """A token per row of logits [B, vocabulary], by its probability (torch.multinomial takes ten times as long)."""
    cumulated = logits.softmax(-1).cumsum(-1)
    if torch.isnan(cumulated).any():
        raise PopcompileError(f"the model cannot be sampled from: {NO_NUMBERS}")
    threshold = torch.rand(len(logits), 1, generator=random) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, threshold).clamp(max=logits.shape[1] - 1)[:, 0]


def _write_in_place(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """append_kv for a cache whose last slot is still empty: all rows are equally long, one token at a time."""
    cache[:, :, -1:] = new
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
    """attention of one token per row to a cache without slack, by groups of heads: no copy of a key per head.

    A token alone sees nothing beyond itself, whatever its `ends`.

    In plain fp32: keys get longer with every token, and oneDNN would keep a bf16 kernel for each length.
    """
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
