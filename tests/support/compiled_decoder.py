"""The decoder of a tiny vision-language model through every pass, beside transformers' module with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache, cached_property
from pathlib import Path

import onnx_ir
import onnxruntime
import torch
from conftest import materialise
from torch import Tensor, fx
from transformers import PreTrainedConfig, PreTrainedModel
from vision_reference import random_model

from popcompile.export.onnx_graph import to_onnx
from popcompile.export.weights import write_weights
from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, canonicalization, lowering, pruning
from popcompile.passes.graph import cache_of, shape_of


class CompiledDecoder:
    """What is made of a config, each when it is first asked for. pruned: layers; window: of the prefill.

    dtype: of the graphs; transformers' module is in fp32.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.dtype = config, dtype
        self.graph = cache(self._graph)

    @cached_property
    def model(self) -> PreTrainedModel:
        return random_model(deepcopy(self.config))

    @cached_property
    def canonical(self) -> Program:
        program = trace(deepcopy(self.config), self.dtype)
        PassManager(canonicalization()).run(program)
        return program

    def compiled(self, pruned: Sequence[int], window: int = 1) -> Program:
        """Both stages, before lowering."""
        program = self.canonical.clone()
        PassManager(pruning(pruned, window=window)).run(program)
        return program

    def lowered(self, pruned: Sequence[int], window: int = 1) -> Program:
        program = self.compiled(pruned, window)
        PassManager(lowering()).run(program)
        return program

    def with_weights(self, program: Program, stage: str) -> fx.GraphModule:
        return materialise(program.graphs[stage], program, self.model.state_dict())

    def _graph(self, stage: str, pruned: tuple[int, ...] = (), window: int = 1) -> fx.GraphModule:
        """A stage's graph with weights."""
        return self.with_weights(self.compiled(pruned, window), stage)

    def sessions(
        self, folder: Path, pruned: Sequence[int], window: int = 1, provider: str = "cpu"
    ) -> dict[str, onnxruntime.InferenceSession]:
        """Both graphs of a split package for a provider, on the CPU."""
        program = self.lowered(pruned, window)
        models, weights = to_onnx(program, ["prefill", "decode"], provider), self.model.state_dict()
        write_weights(folder / "weights.onnx.data", models, program, lambda name: weights[name].to(self.dtype))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        found = {}
        for stage, model in models.items():
            onnx_ir.save(model, folder / f"{stage}.onnx")
            found[stage] = onnxruntime.InferenceSession(
                folder / f"{stage}.onnx", options, providers=["CPUExecutionProvider"]
            )
        return found


def empty_cache(program: Program, rows: int = 1) -> list[Tensor]:
    """Key and value of every layer, of no tokens, in fp32."""
    shapes = (shape_of(node) for node in cache_of(next(iter(program.graphs.values()))))
    return [torch.zeros(rows, heads, 0, size) for _, heads, _, size in shapes]


def run_session(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits and cache, of inputs in the graph's order."""
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
    logits, *present = map(torch.from_numpy, found)
    return logits, present


@torch.no_grad()
def run_decoder(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    logits, *present = gm(*inputs)
    return logits, present


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of any two tensors, relative to what is largest in the second."""
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
