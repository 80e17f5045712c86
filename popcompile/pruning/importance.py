"""How much prefill and decode need each layer: the Fisher information of virtual gates (POP, arXiv 2602.03295).

    I_l^stage = E_x E_{y ~ p(·|x)} [ (d log p(y|x) / d g_l^stage)^2 ]

x is a text whose last token is the boundary token, y a token drawn from the model's own prediction there, and g the
gates of passes/insert_virtual_gates.py, all at 1. Labels and places vary, texts hardly do (of the variance of one
sample on SmolLM2 about two thirds are the label's, a third is the place's, and nothing that could be told from zero is
the text's), so several prefixes of a text are samples of their own. The gated graph runs with the checkpoint's weights,
one prefix at a time; parameters need no gradients, so memory holds the weights and one prefix's activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from popcompile.errors import PopcompileError
from popcompile.package.report import Importance
from popcompile.passes import InsertVirtualGates, PassManager, Program, ops
from popcompile.passes.graph import find, inputs_of, shape_of
from popcompile.passes.insert_virtual_gates import GATES, Per
from popcompile.passes.prune_lm_head import PruneLMHead
from popcompile.passes.split_stages import SplitStages
from popcompile.pruning.execution import NO_NUMBERS, Reader, call_reference, device_of, materialise
from popcompile.pruning.rows import Rows, decoder_inputs

#: prefixes of every text that are texts of their own, one forward and one backward pass each
PREFIXES = 8


@torch.enable_grad()
def importance(
    program: Program,
    read: Reader,
    texts: Rows,
    *,
    per: Per = "layer",
    seed: int = 0,
    prefixes: int = PREFIXES,
    progress: Callable[[int, int], Any] | None = None,
) -> Importance:
    """Importance of every layer, or block of it, for both stages.

    program: canonical, not split; it is left as it is. read: a parameter by its traced name. texts: at least 2 tokens
    each. prefixes: how many of every text are used, evenly from half of it to the whole. seed: of the labels.
    progress(done, total) counts prefixes. The same arguments give the same numbers on the same machine.

    Raises PopcompileError where the model's probabilities are no numbers, ContractError where the graph is not
    canonical or has no such blocks.
    """
    model, blocks = _gated_model(program, read, per)
    device = device_of(model)
    gates = torch.ones([int(d) for d in shape_of(inputs_of(model)[GATES])], device=device, requires_grad=True)
    shapes = [shape_of(n) for n in find(model, op=ops.append_kv)]
    caches = [torch.zeros(1, int(shape[1]), 0, int(shape[3]), device=device) for shape in shapes]
    run, inputs = call_reference(model), decoder_inputs(program, read)
    random = torch.Generator().manual_seed(random_stream(seed, "labels"))
    lengths = prefix_lengths(texts.length, prefixes)
    squares = torch.zeros(len(texts), *gates.shape, dtype=torch.float64)
    for i in range(len(texts)):
        text = texts[i : i + 1]
        for j, length in enumerate(lengths):
            tokens, *others = (each.to(device) for each in inputs.of(text, text.slots[:, :length]))
            mask = torch.ones(1, length, dtype=torch.int64, device=device)
            log_p = run(tokens, mask, *others, *caches, gates)[0][0, -1].float().log_softmax(-1)
            _require_numbers(log_p, i)
            label = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=random)[0]
            (gradient,) = torch.autograd.grad(log_p[label], gates)
            squares[i] += gradient.double().cpu() ** 2 / len(lengths)
            if progress:
                progress(i * len(lengths) + j + 1, len(texts) * len(lengths))
    return _mean(squares.view(len(texts), -1, 2), blocks)


def prefix_lengths(length: int, count: int) -> list[int]:
    """Up to `count` different lengths from half of `length` (at least 2) to all of it, ascending."""
    return sorted({round(n) for n in torch.linspace(length, max(length / 2, 2), count).tolist()})


def _gated_model(program: Program, read: Reader, per: Per) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The model with gates and real weights that returns the boundary token's logits; what its layers' blocks are."""
    gated = program.clone()
    insert = InsertVirtualGates(per)
    PassManager([insert, SplitStages(), PruneLMHead()]).run(gated)
    return materialise(gated.graphs["prefill"], gated, read), insert.blocks


def _mean(squares: Tensor, blocks: tuple[str, ...]) -> Importance:
    """squares [texts, gates, 2], of one text averaged over its prefixes."""
    mean = squares.mean(0)
    error = squares.std(0) / len(squares) ** 0.5 if len(squares) > 1 else torch.full_like(mean, float("nan"))
    return Importance(mean[:, 0].tolist(), mean[:, 1].tolist(), error[:, 0].tolist(), error[:, 1].tolist(), blocks)


def _require_numbers(log_p: Tensor, text: int) -> None:
    if torch.isnan(log_p).any():
        raise PopcompileError(f"text {text + 1} of the analysis: {NO_NUMBERS}")


def random_stream(seed: int, use: str) -> int:
    """A seed of its own for each use of random numbers."""
    return int.from_bytes(hashlib.sha256(f"{use} {seed}".encode()).digest()[:8], "big") >> 1
