"""Decide which layers prefill skips and calibrate what takes their place: between tracing and pruning.

    text -> sets of layers, each calibrated and measured on held-out text -> choice -> refinement
    -> quality on text that has decided nothing

Without calibration, and with the layers or their number given, nothing has to be run: conversion then reads weights
only to write them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from popcompile.calibration import Calibration
from popcompile.calibration_text import SELF, TEXTS, calibration_text
from popcompile.choice import Budget, Candidate, Search, first_candidate, largest_count
from popcompile.execution import Reader, held_in_memory, materialise, require_memory
from popcompile.held_out import HeldOut
from popcompile.hidden_states import HiddenStates
from popcompile.layer_table import full_prefill_one_logit
from popcompile.layerwise import LayerwiseModel
from popcompile.passes import Program
from popcompile.passes.flops import REFERENCE_SIZES, flops_by_layer
from popcompile.passes.graph import runs, shape_of
from popcompile.passes.layers import layer_output, projected_kv
from popcompile.refinement import STEPS
from popcompile.selection import Request

#: the loss that `convert` allows where the user says nothing: KL of the first token, in nats
MAX_KL = 0.05

Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Options:
    """calibrated: fit KV projections and bypasses; else the layers' own projections. origin: "self" or a text file.

    texts: pieces of it. steps: of refinement. window: tokens at a prompt's end that take the whole model.
    """

    window: int
    calibrated: bool = True
    origin: str = SELF
    texts: int = TEXTS
    steps: int = STEPS
    budget: Budget = field(default_factory=lambda: Budget(max_kl=MAX_KL))
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The pruned layers, what takes their place, and the report's sections about it."""

    pruned: list[int]
    calibration: Calibration = field(default_factory=Calibration)
    sections: dict[str, Any] = field(default_factory=dict)


def needs_weights(num_layers: int, request: Request, options: Options) -> bool:
    """Whether the model has to be run to plan. To skip the last layer alone costs nothing."""
    if request.how == "auto":
        return num_layers > 1
    return options.calibrated and not set(request.layers) <= {num_layers - 1}


@torch.no_grad()
def make_plan(
    program: Program,
    read: Reader,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    request: Request,
    options: Options,
    folder: Path,
    progress: Progress,
) -> Plan:
    """program: canonical; it is left as it is. folder: where files of the size of the hidden states may be.

    Raises PopcompileError, ContractError.
    """
    if not needs_weights(program.num_layers, request, options):
        return Plan(request.layers)
    require_memory(program, name)
    read = held_in_memory(read, name)
    text = calibration_text(
        options.origin, program, read, tokenizer, texts=options.texts, window=options.window,
        seed=options.seed, progress=lambda *n: progress("sample", *n),
    )  # fmt: skip
    layers = program.num_layers
    most = largest_count(layers) if request.how == "auto" else len(request.layers)
    first = min(request.layers) if request.how == "layers" else first_candidate(layers, most)
    model = LayerwiseModel(materialise(program.graphs["model"], program, read))
    states = None
    if options.calibrated:
        states = HiddenStates(model, text.calibration, first, folder, lambda *n: progress("calibrate", *n))
    held_out = HeldOut(
        model, text.held_out, first, text.prompt, options.seed, options.window, text.retrieval_held_out, folder
    )
    search = Search(states, held_out, progress, steps=options.steps, seed=options.seed)
    if request.how == "auto":
        chosen = search.within(options.budget)
    elif request.how == "layers":
        chosen = search.finish(request.layers)
    else:
        chosen = search.best(len(request.layers), Budget(max_kl=MAX_KL))
    calibration = search.final(chosen)
    unseen = HeldOut(
        model, text.unseen, chosen.pruned[0], text.prompt, options.seed, options.window, text.retrieval_unseen, folder
    )
    sections = {
        "choice": _choice(program, search, chosen, request, options),
        "quality": {
            "text": text.source,
            "texts": len(text.unseen),
            "prompt_tokens": text.prompt,
            "window": options.window,
            "continuation_tokens": text.unseen.shape[1] - text.prompt,
            "loss": asdict(unseen.measure(chosen.pruned, calibration)),
            "own_projection": asdict(unseen.measure(chosen.pruned, Calibration())),
        },
    }
    return Plan(chosen.pruned, calibration, sections)


def _choice(program: Program, search: Search, chosen: Candidate, request: Request, options: Options) -> dict[str, Any]:
    candidates = sorted(search.measured, key=lambda c: (len(c.pruned), c.loss.worst_kl))
    speedups = predicted_speedups(program, [c.pruned for c in candidates], options.calibrated, options.window)
    frontier = [
        {
            "pruned": candidate.pruned,
            "speedup": round(speedup, 4),
            "loss": asdict(candidate.loss),
            "refined": candidate.refined,
            "chosen": candidate is chosen,
        }
        for candidate, speedup in zip(candidates, speedups, strict=True)
    ]
    return {
        "how": request.how,
        "budget": asdict(options.budget) if request.how == "auto" else None,
        "met": request.how != "auto" or len(chosen.pruned) > 1,
        "frontier": frontier,
    }


def predicted_speedups(program: Program, candidates: Sequence[list[int]], bypass: bool, window: int = 1) -> list[float]:
    """FLOPs of the whole model's prefill with one row of logits over those of each pruned one, at 1,024 tokens.

    candidates: sets of pruned layers. bypass: whether a bypass follows every run of them. window: tokens at the end of
    the prompt that take every layer.
    """
    graph = program.graphs["model"]
    tokens, hidden = REFERENCE_SIZES["prefill"]["sequence"], int(shape_of(layer_output(graph, 0))[2])
    whole, step = flops_by_layer(graph, "prefill"), flops_by_layer(graph, "decode")
    total = full_prefill_one_logit(graph)

    @cache
    def saved(layer: int) -> int:
        key, value = projected_kv(graph, layer)
        width = int(shape_of(key)[2]) + int(shape_of(value)[2])
        return whole[layer] - min(window, tokens) * step[layer] - 2 * tokens * hidden * width

    def flops(pruned: list[int]) -> int:
        bypasses = sum(last + 1 < program.num_layers for _, last in runs(pruned)) if bypass else 0
        return total - sum(saved(layer) for layer in pruned) + bypasses * 2 * tokens * hidden**2

    return [total / flops(pruned) for pruned in candidates]
