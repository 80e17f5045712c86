"""Shared by tests of calibration: models cut at their layers, and random calibrated maps."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from conftest import materialise, tiny_model
from families import layers_of
from reference import KVMaps, Map
from transformers import PreTrainedConfig, PreTrainedModel

from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, canonicalization, pruning
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.regression import AffineMap, Calibration


@dataclass
class Traced:
    """transformers' module and its canonical graph."""

    model: PreTrainedModel
    program: Program

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Traced:
        program = trace(deepcopy(config))
        PassManager(canonicalization()).run(program)
        return cls(tiny_model(deepcopy(config)), program)

    @cached_property
    def layers(self) -> LayerwiseModel:
        graph = materialise(self.program.graphs["model"], self.program, self.model.state_dict())
        return LayerwiseModel(graph)

    def prune(self, pruned: Iterable[int], calibration: Calibration) -> Program:
        """The program with a pruned prefill that has these maps."""
        program = self.program.clone()
        program.constants = program.constants | calibration.constants()
        PassManager(pruning(pruned, calibration.projections, calibration.bypasses)).run(program)
        return program


def random_maps(model: PreTrainedModel, calibrated: Iterable[int], bypassed: Iterable[int], seed: int) -> Calibration:
    """Maps whose outputs, like what layers add in tiny_model, change logits by more than 0.1."""
    hidden, heads = model.config.hidden_size, model.config.num_key_value_heads
    head_size = layers_of(model)[0].self_attn.head_dim
    random = torch.Generator().manual_seed(seed)

    def affine(size: int) -> AffineMap:
        weight, bias, sink = (torch.randn(*shape, generator=random) for shape in ((size, hidden), (size,), (size,)))
        return AffineMap(0.3 * weight, 0.3 * bias, sink)

    return Calibration(
        projections={layer: affine(2 * heads * head_size) for layer in calibrated},
        bypasses={first: affine(hidden) for first in bypassed},
    )


def reference_maps(calibration: Calibration) -> tuple[dict[int, KVMaps], dict[int, Map]]:
    """A calibration as reference.pop_prefill takes it: projections and bypasses."""
    projections = {}
    for layer, both in calibration.projections.items():
        keys, values = zip(*(t.chunk(2) for t in (both.weight, both.bias, both.sink)), strict=True)
        projections[layer] = (Map(*keys), Map(*values))
    bypasses = {first: Map(m.weight, m.bias, m.sink) for first, m in calibration.bypasses.items()}
    return projections, bypasses
