"""InsertVirtualGates: the graph as text, its contract, what gates of 1 and of 0 mean, and derivatives by gates.

The texts in tests/passes/graphs/gates are a tiny Llama's with gates per layer and per block; `--update-graphs`
rewrites them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from canonical import CONFIGS, LAYERS, canonical
from conftest import Inputs, make_inputs, materialise, run_graph, tiny_llama
from steps import numbered
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from popcompile.frontend.tracing import trace
from popcompile.passes import ContractError, InsertVirtualGates, PassManager, Program, canonicalization, ops, pruning
from popcompile.passes.graph import find, inputs_of, outputs_of, shape_of
from popcompile.passes.layers import layer_output
from popcompile.passes.printing import print_graph
from popcompile.pruning.execution import call_reference

GRAPHS = Path(__file__).parent / "graphs" / "gates"
SHAPES = {"layer": (LAYERS, 2), "block": (LAYERS, 2, 2)}
#: prompts of 9 and 4 tokens after 3, so that Gemma's window of 8 slides and one row is padded
LENGTHS, PAST = [9, 4], 3


def gated(family: str, per: str) -> fx.GraphModule:
    """The gated graph with weights."""
    model, original = canonical(family)
    program = original.clone()
    PassManager([InsertVirtualGates(per)]).run(program)
    return materialise(program.graphs["model"], program, model.state_dict())


def run_gated(gm: fx.GraphModule, inputs: Inputs, gates: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        logits, *cache = gm(inputs.ids, inputs.mask, *inputs.past, gates)
    return logits, cache


# --- graph and contract ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "block"])
def test_graph_after(per: str, request: pytest.FixtureRequest) -> None:
    program = trace(tiny_llama())
    PassManager(canonicalization()).run(program)
    (record,) = PassManager([InsertVirtualGates(per)]).run(program)
    assert record.matches == {"layer": 2, "block": 4}[per]
    text = print_graph(program.graphs["model"], "model")
    file = GRAPHS / f"InsertVirtualGates-{per}.model.txt"
    if request.config.getoption("--update-graphs"):
        GRAPHS.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert numbered(text).splitlines() == numbered(file.read_text(encoding="utf-8")).splitlines()


def is_split(program: Program) -> None:
    program.graphs["prefill"] = program.graphs["model"]


def is_gated(program: Program) -> None:
    PassManager([InsertVirtualGates()]).run(program)


def is_not_annotated(program: Program) -> None:
    for node in find(program.graphs["model"], op=ops.attention):
        del node.meta["layer"]


def scales_its_output(program: Program) -> None:
    """A layer that multiplies what it hands on is no chain of residual adds."""
    gm = program.graphs["model"]
    end = layer_output(gm, 1)
    with gm.graph.inserting_after(end):
        scaled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (end, 2.0))
    scaled.meta = dict(end.meta)
    end.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def adds_both_at_once(program: Program) -> None:
    """x + (attention + MLP), in layer 1: what models with parallel blocks do."""
    gm = program.graphs["model"]
    second = layer_output(gm, 1)
    first = next(n for n in second.all_input_nodes if n.target == second.target)
    before, attention = first.args
    mlp = next(n for n in second.all_input_nodes if n is not first)
    with gm.graph.inserting_before(second):
        both = gm.graph.call_function(second.target, (attention, mlp))
    both.meta = dict(second.meta)
    second.args = (before, both)
    first.replace_all_uses_with(before)
    gm.graph.erase_node(first)


@pytest.mark.parametrize(
    ("damage", "per", "message"),
    [
        (is_split, "layer", "the program is split already"),
        (is_gated, "layer", "the graph has gates already"),
        (is_not_annotated, "layer", r"attention nodes are in layers \[None, None, None, None\]"),
        (scales_its_output, "block", "layer 1 is no chain of residual adds: 0 follow .*; its gates can only be per"),
        (adds_both_at_once, "block", r"layer 1 adds attention \+ mlp to the residual stream, .* only be per layer"),
    ],
)
def test_contract(damage: Callable[[Program], object], per: str, message: str) -> None:
    program = canonical("llama")[1].clone()
    damage(program)
    gate = InsertVirtualGates(per)
    gate.program = program
    with pytest.raises(ContractError, match=f"^InsertVirtualGates: {message}"):
        gate(program.graphs["model"])


@pytest.mark.parametrize("damage", [scales_its_output, adds_both_at_once])
def test_layers_of_any_structure_have_gates_per_layer(damage: Callable[[Program], object]) -> None:
    program = canonical("llama")[1].clone()
    damage(program)
    PassManager([InsertVirtualGates("layer")]).run(program)
    assert len(find(program.graphs["model"], op=ops.virtual_gate)) == LAYERS


def test_ensures_a_gate_everywhere() -> None:
    program = canonical("llama")[1].clone()
    gate = InsertVirtualGates()
    PassManager([gate]).run(program)
    gm = program.graphs["model"]
    node = find(gm, op=ops.virtual_gate)[2]
    node.replace_all_uses_with(node.args[1])
    gm.graph.erase_node(node)
    with pytest.raises(ContractError, match=r"gates are \[\(0,\), \(1,\), \(3,\)\], not"):
        gate.ensures(gm)


@pytest.mark.parametrize("per", ["layer", "block"])
def test_inputs_and_outputs(per: str) -> None:
    """One more input, after the others; shapes of outputs as they were."""
    program = canonical("gemma3")[1].clone()
    before = program.graphs["model"]
    inputs, shapes = list(inputs_of(before)), [str(shape_of(n)) for n in outputs_of(before)]
    PassManager([InsertVirtualGates(per)]).run(program)
    after = program.graphs["model"]
    assert list(inputs_of(after)) == [*inputs, "gates"]
    assert shape_of(inputs_of(after)["gates"]) == SHAPES[per]
    assert [str(shape_of(n)) for n in outputs_of(after)] == shapes


# --- meaning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("per", SHAPES)
def test_gates_of_1_change_no_bit(family: str, per: str) -> None:
    model, program = canonical(family)
    inputs = make_inputs(model, LENGTHS, PAST)
    logits, kv = run_graph(materialise(program.graphs["model"], program, model.state_dict()), inputs)
    gated_logits, gated_kv = run_gated(gated(family, per), inputs, torch.ones(SHAPES[per]))
    for a, b in zip([gated_logits, *gated_kv], [logits, *kv], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", CONFIGS)
def test_prefill_gates_of_0_are_pruned_prefill(family: str) -> None:
    """Random sets of layers: logits of the boundary token and the cache of PrunePrefill and what follows it."""
    model, original = canonical(family)
    inputs = make_inputs(model, LENGTHS, PAST)
    gm, differs = gated(family, "layer"), 0
    none, last = [], [LAYERS - 1]
    drawn = random.Random(family).sample(range(1, 2 ** (LAYERS - 1)), 4)  # which others; the last layer at random
    others = [[layer for layer in range(LAYERS) if chosen >> layer & 1] for chosen in (d + 8 * (d % 2) for d in drawn)]
    sets = [none, last, *others]
    full, _ = run_gated(gm, inputs, torch.ones(LAYERS, 2))
    for pruned in sets:
        program = original.clone()
        PassManager(pruning(pruned)).run(program)
        logits, kv = run_graph(materialise(program.graphs["prefill"], program, model.state_dict()), inputs)
        gates = torch.ones(LAYERS, 2)
        gates[pruned, 0] = 0
        all_logits, gated_kv = run_gated(gm, inputs, gates)
        for row, length in enumerate(LENGTHS):
            # a matrix product of one token sums in another order than one of many
            torch.testing.assert_close(all_logits[row, length - 1], logits[row, 0], rtol=0, atol=2e-5)
            for a, b in zip(gated_kv, kv, strict=True):
                slots = PAST + length
                torch.testing.assert_close(a[row, :, :slots], b[row, :, :slots], rtol=0, atol=2e-5)
            differs += bool((all_logits[row, length - 1] - full[row, length - 1]).abs().max() > 0.1)
    assert differs == 2 * len(others)  # the last layer is free


@pytest.mark.parametrize("family", CONFIGS)
def test_the_decode_gate_is_the_boundary_tokens(family: str) -> None:
    """It moves nothing of a context token, and the last layer's prefill gate moves nothing of the boundary token."""
    inputs = make_inputs(canonical(family)[0], LENGTHS, PAST)
    gm = gated(family, "layer")
    full, _ = run_gated(gm, inputs, torch.ones(LAYERS, 2))
    decode = torch.ones(LAYERS, 2)
    decode[:, 1] = 0.5
    last = torch.ones(LAYERS, 2)
    last[-1, 0] = 0.5
    by_decode, by_last = run_gated(gm, inputs, decode)[0], run_gated(gm, inputs, last)[0]
    # an expert's product is of all tokens that chose it, and rounds as many of them do together
    same = partial(torch.testing.assert_close, rtol=0, atol=1e-5 if "moe" in family else 0)
    for row, length in enumerate(LENGTHS):
        same(by_decode[row, : length - 1], full[row, : length - 1])
        assert (by_decode[row, length - 1] - full[row, length - 1]).abs().max() > 0.1
        same(by_last[row, length - 1], full[row, length - 1])
        assert (by_last[row, : length - 1] - full[row, : length - 1]).abs().max() > 0.1


def test_a_layers_gate_is_both_of_its_blocks_gates_at_0() -> None:
    inputs = make_inputs(canonical("gemma3")[0], LENGTHS, PAST)
    layer, block = torch.ones(SHAPES["layer"]), torch.ones(SHAPES["block"])
    layer[1, 0], block[1, :, 0] = 0, 0
    by_layer, by_block = (
        run_gated(gated("gemma3", "layer"), inputs, layer),
        run_gated(gated("gemma3", "block"), inputs, block),
    )
    for a, b in zip([by_layer[0], *by_layer[1]], [by_block[0], *by_block[1]], strict=True):
        assert torch.equal(a, b)


def test_operator_scales_what_was_added() -> None:
    torch.manual_seed(0)
    before, after = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    gates = torch.tensor([[1.0, 1.0], [0.25, 0.75]])
    out = ops.virtual_gate(before, after, gates, [1], torch.tensor([3, 1]))
    g = torch.tensor([[0.25, 0.25, 0.25, 0.75, 0.75], [0.25, 0.75, 0.75, 0.75, 0.75]])[..., None]
    torch.testing.assert_close(out, before + g * (after - before))


# --- derivatives -----------------------------------------------------------------------------------------------


def rms_norm_in_double(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The vocabulary's norm is defined in fp32, whose rounding finite differences would see."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def in_double(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph in double precision, also where it asks for fp32: norms, and the softmax of routers."""
    double = call_reference(gm.double(), {ops.rms_norm: rms_norm_in_double})
    for node in double.graph.nodes:
        node.args = map_aggregate(node.args, lambda a: torch.float64 if a is torch.float32 else a)
    double.recompile()
    return double


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("per", SHAPES)
def test_derivatives_are_finite_differences(family: str, per: str) -> None:
    inputs = make_inputs(canonical(family)[0], [9], PAST)
    run = in_double(gated(family, per))
    past = [t.double() for t in inputs.past]

    def log_p(gates: Tensor) -> Tensor:
        return run(inputs.ids, inputs.mask, *past, gates)[0][0, -1].log_softmax(-1)[7]

    gates = torch.ones(SHAPES[per], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_p(gates), gates)
    step, differences = 1e-5, torch.zeros(SHAPES[per], dtype=torch.float64)
    with torch.no_grad():
        for entry in torch.cartesian_prod(*[torch.arange(n) for n in SHAPES[per]]):
            moved = torch.zeros(SHAPES[per], dtype=torch.float64)
            moved[tuple(entry)] = step
            differences[tuple(entry)] = (log_p(1 + moved) - log_p(1 - moved)) / (2 * step)
    # the error of central differences is step^2 times a third derivative, here up to some thousands
    torch.testing.assert_close(gradient, differences, rtol=1e-5, atol=1e-6)
    assert (gradient[-1, ..., 0] == 0).all() and (gradient[:-1].abs() > 1e-3).all()
