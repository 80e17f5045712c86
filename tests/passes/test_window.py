"""A window of tokens at a prompt's end that takes the whole model: against transformers, pass by pass and in ONNX."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from conftest import Inputs, make_inputs, materialise, run_graph, tiny_gemma3, tiny_llama, tiny_model
from reference import pop_prefill
from steps import Step, assert_close, compile_in_steps, rows, run_onnx
from torch import Tensor
from transformers import PreTrainedModel

from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, transformations

CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=3),
    "gemma3": tiny_gemma3(),
    "llama, small heads": tiny_llama(num_hidden_layers=3, head_dim=8),
    "gemma3, small heads": tiny_gemma3(head_dim=8),
}
#: inner, deepest, two runs
PRUNED = [(1,), (1, 2), (0, 2)]


@cache
def compiled(family: str, pruned: tuple[int, ...], window: int) -> tuple[PreTrainedModel, dict[str, Step]]:
    config = CONFIGS[family]
    return tiny_model(config), compile_in_steps(config, pruned, window)


def expected(model: PreTrainedModel, inputs: Inputs, pruned: tuple[int, ...], window: int) -> list[list[Tensor]]:
    """Every row alone, unpadded, through the reference; logits of the boundary token."""
    found = []
    for i, n in enumerate(inputs.lengths):
        logits, kv = pop_prefill(model, inputs.ids[i : i + 1, :n], pruned, inputs.cache(i), window=window)
        found.append([logits[0], *(t[0] for layer in kv.layers for t in (layer.keys, layer.values))])
    return found


@cache
def pruned_program(family: str, pruned: tuple[int, ...], window: int) -> tuple[PreTrainedModel, Program]:
    program = trace(deepcopy(CONFIGS[family]))
    PassManager(transformations(pruned, window)).run(program)
    return tiny_model(CONFIGS[family]), program


@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefill_is_the_reference(family: str, pruned: tuple[int, ...], window: int) -> None:
    """Rows that are longer than the window, shorter, and padded, after a past; a window beyond the prompt is exact."""
    model, program = pruned_program(family, pruned, window)
    for lengths, past in (([9, 4], 3), ([9, 1, 6], 0), ([2], 3)):
        inputs = make_inputs(model, lengths, past)
        result = run_graph(materialise(program.graphs["prefill"], program, model.state_dict()), inputs)
        assert_close(rows(inputs, result), expected(model, inputs, pruned, window), 1e-5)


@pytest.mark.parametrize(
    ("family", "window"), [("llama", 5), ("llama", 64), ("gemma3", 5), *((f, 5) for f in list(CONFIGS)[2:])]
)
def test_compiled_prefill_is_the_reference(family: str, window: int, tmp_path: Path) -> None:
    """A batch, whose rows' tails are attended for one by one, and one row with room in its cache."""
    model, steps = compiled(family, (1,), window)
    inputs = [
        make_inputs(model, [9, 4, 7]), make_inputs(model, [9], 3), make_inputs(model, [2], 3), make_inputs(model, [30]),
        make_inputs(model, [4, 2]), make_inputs(model, [1, 1], 3),
    ]  # fmt: skip
    for given, result in zip(inputs, run_onnx(tmp_path, steps["LastCleanup"], "prefill", model, inputs), strict=True):
        # other kernels; logits are up to 10
        assert_close(rows(given, result), expected(model, given, (1,), window), 1e-4)
