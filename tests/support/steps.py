"""Shared by tests of passes: a program after every pass, its text, and what its graphs compute."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx_ir
import onnxruntime
import torch
from conftest import Inputs, tiny_llama
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from popcompile.export.onnx_graph import to_onnx
from popcompile.export.weights import write_weights
from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, lowering, transformations
from popcompile.passes.printing import print_graph

GRAPHS = Path(__file__).parents[1] / "passes" / "graphs"
PASSES = ["Traced", *(p.name for p in [*transformations([]), *lowering()][:-1]), "LastCleanup"]
Result = tuple[Tensor, list[Tensor]]


@dataclass
class Step:
    """A program after one pass."""

    name: str
    program: Program
    texts: dict[str, str]


def compile_in_steps(config: PreTrainedConfig, pruned: Iterable[int], window: int = 1) -> dict[str, Step]:
    """The program after tracing and after every pass, by pass name."""
    program = trace(copy.deepcopy(config))
    steps: dict[str, Step] = {}
    for name, compiler_pass in zip(PASSES, [None, *transformations(pruned, window), *lowering()], strict=True):
        if compiler_pass is not None:
            PassManager([compiler_pass]).run(program)
        texts = {stage: print_graph(gm, stage) for stage, gm in program.graphs.items()}
        steps[name] = Step(name, program.clone(), texts)
    return steps


@cache
def llama_steps() -> dict[str, Step]:
    return compile_in_steps(tiny_llama(), [1])


def before(steps: dict[str, Step], name: str) -> Step:
    """The step before a pass."""
    names = list(steps)
    return steps[names[names.index(name) - 1]]


def numbered(text: str) -> str:
    """The text with values numbered in order: torch counts mul, mul_1, ... differently from version to version."""
    names: dict[str, str] = {}
    for name in re.findall(r"^    (\w+)(?: =|:) ", text, re.MULTILINE):
        stem = re.sub(r"_\d+$", "", name) if not name.startswith("past_key_values") else name
        names[name] = f"{stem}.{sum(n.startswith(stem + '.') for n in names.values())}"
    lines = [line.partition("  # ") for line in text.splitlines()]
    value = re.compile(r"(?<![\w.])(\w+)(?![\w.(=])")
    return "\n".join(value.sub(lambda m: names.get(m[1], m[1]), code) + mark + rest for code, mark, rest in lines)


# --- running ---------------------------------------------------------------------------------------------------


def rows(inputs: Inputs, result: Result) -> list[list[Tensor]]:
    """What counts of a result, by row: logits of valid tokens (or of the one token there is), valid slots."""
    logits, kv = result
    return [
        [logits[i, :n] if logits.shape[1] > 1 else logits[i], *(t[i, :, :slots] for t in kv)]
        for i, (n, slots) in enumerate(zip(inputs.lengths, inputs.valid_slots, strict=True))
    ]


def assert_close(actual: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float) -> None:
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            what = f"row {i}, " + ("logits" if j == 0 else f"present.{(j - 1) // 2}.{'value' if j % 2 == 0 else 'key'}")
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, w=what: f"{w}: {m}")


def run_onnx(folder: Path, step: Step, stage: str, model: PreTrainedModel, inputs: list[Inputs]) -> list[Result]:
    program, weights = step.program, model.state_dict()
    onnx_model = to_onnx(program, [stage], "cpu")[stage]
    write_weights(folder / "weights.onnx.data", {stage: onnx_model}, program, lambda name: weights[name])
    onnx_ir.save(onnx_model, folder / f"{stage}.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / f"{stage}.onnx", options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    results = []
    for given in inputs:
        feed = dict(zip(names, (t.numpy() for t in (given.ids, given.mask, *given.past)), strict=True))
        logits, *kv = (torch.from_numpy(t) for t in session.run(None, feed))
        results.append((logits, kv))
    return results
