"""Decide which layers prefill skips and calibrate what takes their place: between tracing and pruning.

    text -> sets of layers, each calibrated and measured on held-out text -> choice -> refinement
    -> quality on text that has decided nothing

Without calibration, and with the layers or their number given, nothing has to be run: conversion then reads weights
only to write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.package.measurements import LayerChoice, Point, Quality
from popcompile.passes import Program
from popcompile.passes.flops import REFERENCE_SIZES, flops_by_layer
from popcompile.passes.graph import runs, shape_of
from popcompile.passes.layers import hands_on_directly, layer_output, projected_kv
from popcompile.progress import Progress
from popcompile.pruning.calibration_set import CalibrationSet, calibration_set
from popcompile.pruning.costs import full_prefill_one_logit
from popcompile.pruning.device import CPU
from popcompile.pruning.execution import (
    HeldParameters,
    Reader,
    checked,
    computing_in_fp32,
    fast_products,
    materialise,
    parameter_reader,
)
from popcompile.pruning.held_out import HeldOutKinds
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.image_prompts import ImageSource
from popcompile.pruning.input_factors import input_factors
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.refinement import STEPS, Answers
from popcompile.pruning.regression import Calibration
from popcompile.pruning.request import Request
from popcompile.pruning.rows import decoder_inputs
from popcompile.pruning.search import Budget, Candidate, Search, Speedup, first_candidate, largest_count
from popcompile.pruning.steps import COMPUTED, Steps
from popcompile.pruning.text import SELF, TEXTS
from popcompile.pruning.weights import StreamedWeights, room_for_weights

#: the loss that `convert` allows where the user says nothing: KL in nats
MAX_KL = 0.05
#: tokens of the prompts that the choice is made for, as far as the context goes
PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Options:
    """calibrated: fit KV projections and bypasses; else the layers' own projections. origin: "self" or a text file.
    pictures: a folder of the user's, for a model that takes images.

    texts: pieces of it. steps: of refinement. windows: tokens at a prompt's end that take the whole model, the most
    first; smaller ones only `auto` takes. prompt_tokens: of the prompts that the choice is made for. int8_activations:
    whether factors for BalanceActivations are measured, where the model is run at all.
    """

    windows: Sequence[int]
    prompt_tokens: int = PROMPT_TOKENS
    calibrated: bool = True
    origin: str = SELF
    pictures: Path | None = None
    texts: int = TEXTS
    steps: int = STEPS
    budget: Budget = field(default_factory=lambda: Budget(max_kl=MAX_KL))
    int8_activations: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The pruned layers, the window of tokens that take them all the same, what takes their place, factors of input
    features by constant (input_factors.py), and the report's sections about it.
    """

    pruned: list[int]
    window: int
    calibration: Calibration = field(default_factory=Calibration)
    factors: dict[str, Tensor] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)

    def constants(self) -> dict[str, Tensor]:
        """What passes read of it, by the names that they give."""
        return self.calibration.constants() | self.factors


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
    images: ImageSource | None = None,
    steps: Steps = COMPUTED,
    device: torch.device = CPU,
) -> Plan:
    """program: canonical; it is left as it is. folder: where files of the size of the hidden states may be. images:
    what prompts with images are made by. steps: keeps what takes long. device: that the model runs on; what the plan
    holds is on the CPU.

    Raises PopcompileError, ContractError.
    """
    if not needs_weights(program.num_layers, request, options):
        return Plan(request.layers, options.windows[0])
    room = room_for_weights(program, name, sampled=options.origin == SELF or images is not None, device=device)
    window, *smaller = options.windows
    read = checked(read, name) if room is not None else HeldParameters(checked(read, name), device)
    decides = request.how != "layers" or (options.calibrated and options.steps > 0)
    prompts = calibration_set(
        options.origin, program, read, tokenizer, images, texts=options.texts, window=window,
        prompt_tokens=options.prompt_tokens if request.how != "layers" else 0,
        decides=decides, seed=options.seed, steps=steps, progress=lambda *n: progress("sample", *n),
    )  # fmt: skip
    model, first = _layerwise(program, read, room, device), _first_candidate(program.num_layers, request)
    factors = {}
    if options.int8_activations:
        measured = partial(input_factors, model, prompts.fit, lambda *n: progress("balance", *n))
        factors = steps.tensors("input_factors", measured)
    speedup = predicted_speedup(program, options.calibrated, options.prompt_tokens)
    with fast_products(decides):  # what is reported of text that decided nothing is measured in fp32 below
        states = None
        if options.calibrated:
            states = HiddenStates(model, prompts.fit, first, folder, lambda *n: progress("calibrate", *n))
        held_out = prompts.held_out(model, first, window, options.seed, folder)
        search = Search(
            states, held_out, progress, answers=cache(partial(_answers, model, prompts, first, window, folder)),
            steps=options.steps, seed=options.seed, windows=smaller, speedup=speedup, kept=steps,
        )  # fmt: skip
        chosen = _chosen(search, request, options)
    calibration = search.final(chosen)
    progress("measure", 0, 1)
    quality = _quality(held_out, prompts, chosen, calibration, options.seed, folder)
    choice = _choice(search, speedup, chosen, request, options)
    sections = {"choice": choice.to_json(), "quality": quality.to_json()}
    return Plan(chosen.pruned, chosen.window, calibration.to(CPU), factors, sections)


def _first_candidate(layers: int, request: Request) -> int:
    """The first layer that may be pruned: hidden states before it are not needed."""
    if request.how == "layers":
        return min(request.layers)
    return first_candidate(layers, largest_count(layers) if request.how == "auto" else len(request.layers))


def _answers(model: LayerwiseModel, prompts: CalibrationSet, first: int, window: int, folder: Path) -> Answers | None:
    """What refinement counts of texts whose answers stand in them: minutes of work, for what is refined alone."""
    if (lists := prompts.refinement) is None:
        return None
    return Answers(HiddenStates(model, lists.rows, first, folder), lists.answers, prompts.text.prompt - window)


def _chosen(search: Search, request: Request, options: Options) -> Candidate:
    """The layers and the window that were asked for, or that the budget allows; finished."""
    if request.how == "auto":
        return search.within(options.budget)
    if request.how == "layers":
        return search.finish(request.layers)
    return search.best(len(request.layers), Budget(max_kl=MAX_KL))


def _layerwise(program: Program, read: Reader, room: int | None, device: torch.device) -> LayerwiseModel:
    """room: bytes of weights that are kept on the device, None: all, and `read` has put them there."""
    graph, inputs = program.graphs["model"], decoder_inputs(program, read)
    if room is None:
        return LayerwiseModel(materialise(graph, program, read), inputs)
    weights = StreamedWeights(parameter_reader(program, read), room, device)
    return LayerwiseModel(computing_in_fp32(graph, device), inputs, weights)


def _quality(
    held_out: HeldOutKinds,
    prompts: CalibrationSet,
    chosen: Candidate,
    calibration: Calibration,
    seed: int,
    folder: Path,
) -> Quality:
    """What skipping the chosen layers costs, on what had no part in the choice. held_out: what decided."""
    text, images = prompts.text, prompts.images
    if text.unseen is text.held_out:  # there was nothing to decide
        unseen, loss = held_out, chosen.loss
    else:
        unseen = prompts.unseen(held_out.model, chosen.pruned[0], chosen.window, seed, folder)
        loss = unseen.measure(chosen.pruned, calibration)
    return Quality(
        text=text.source,
        texts=len(text.unseen),
        prompt_tokens=text.prompt,
        asked_tokens=text.asked_tokens,
        window=chosen.window,
        continuation_tokens=text.unseen.length - text.prompt,
        loss=loss,
        own_projection=unseen.measure(chosen.pruned, Calibration()),
        images=None if images is None else f"{len(images.unseen)} prompts with {images.source}",
    )


def _choice(search: Search, speedup: Speedup, chosen: Candidate, request: Request, options: Options) -> LayerChoice:
    frontier = [
        Point(
            pruned=candidate.pruned,
            window=candidate.window,
            speedup=round(speedup(candidate.pruned, candidate.window), 4),
            loss=candidate.loss,
            refined=candidate.refined,
            chosen=candidate is chosen,
        )
        for candidate in sorted(search.measured, key=lambda c: (len(c.pruned), c.loss.worst_kl))
    ]
    auto = request.how == "auto"
    return LayerChoice(
        how=request.how,
        max_kl=options.budget.max_kl if auto else None,
        max_ppl_ratio=options.budget.max_ppl_ratio if auto else None,
        met=not auto or len(chosen.pruned) > 1,
        prompt_tokens=options.prompt_tokens,
        frontier=frontier,
    )


def predicted_speedup(program: Program, bypass: bool, tokens: int) -> Speedup:
    """FLOPs of the whole model's prefill with one row of logits over those of a pruned one, for prompts of so many
    tokens: a function of the pruned layers, and of how many tokens at the prompt's end take every layer.

    bypass: whether a bypass follows every run of pruned layers.
    """
    graph = program.graphs["model"]
    prefill = REFERENCE_SIZES["prefill"] | {"sequence": tokens, "total": tokens}
    hidden = int(shape_of(layer_output(graph, 0))[2])
    whole = flops_by_layer(graph, "prefill", prefill)
    step = flops_by_layer(graph, "decode", REFERENCE_SIZES["decode"] | {"past": tokens - 1, "total": tokens})
    total = full_prefill_one_logit(graph, prefill)

    @cache
    def saved(layer: int, window: int) -> int:
        key, value = projected_kv(graph, layer)
        width = int(shape_of(key)[2]) + int(shape_of(value)[2])
        return whole[layer] - min(window, tokens) * step[layer] - 2 * tokens * hidden * width

    joined = cache(partial(hands_on_directly, graph))

    def speedup(pruned: list[int], window: int) -> float:
        bypasses = sum(last + 1 < program.num_layers for _, last in runs(pruned, joined)) if bypass else 0
        return total / (total - sum(saved(layer, window) for layer in pruned) + bypasses * 2 * tokens * hidden**2)

    return speedup
