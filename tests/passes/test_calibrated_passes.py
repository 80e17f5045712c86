"""InsertKVProjection with calibrated maps, and InsertBypass: as text, and against the reference with the same maps.

The texts in tests/passes/graphs/calibrated-Pass.prefill.txt are of a tiny Llama with three layers whose middle one is
pruned, as the inner-... ones of test_passes.py; `--update-graphs` rewrites them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from calibrated import Traced, random_maps, reference_maps
from conftest import Inputs, make_inputs, materialise, run_graph, tiny_gemma3, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pop_prefill
from steps import GRAPHS, Step, assert_close, numbered, rows, run_onnx
from torch import Tensor, fx
from transformers import Olmo2Config, Phi3Config, PreTrainedModel

from popcompile.passes import ContractError, PassManager, Program, Quantization, lowering, pruning
from popcompile.passes.graph import find, runs
from popcompile.passes.insert_kv_projection import InsertKVProjection
from popcompile.passes.printing import print_graph
from popcompile.pruning.regression import AffineMap, Calibration, own_projection
from popcompile.pruning.rows import Rows

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=4),
    "gemma3": tiny_gemma3(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2),
    "phi3": Phi3Config(**SIZES),  # one projection for q, k and v
    "olmo2": Olmo2Config(**SIZES),  # no input norm, k norm over all heads
}


@cache
def traced(family: str) -> Traced:
    found = Traced.of(CONFIGS[family])
    if getattr(found.model.config, "head_dim", None) is None:  # make_inputs reads it
        found.model.config.head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    return found


@cache
def three_layers() -> Traced:
    return Traced.of(tiny_llama(num_hidden_layers=3))


# --- as text -----------------------------------------------------------------------------------------------------


@cache
def texts() -> dict[str, str]:
    """File name -> text of the prefill graph after both passes; layer 1 is pruned, calibrated and bypassed."""
    program, found = three_layers().program.clone(), {}
    for compiler_pass in pruning([1], [1], [1]):
        PassManager([compiler_pass]).run(program)
        if (name := compiler_pass.name) in ("InsertKVProjection", "InsertBypass"):
            file = f"calibrated-{name}.prefill.txt"
            found[file] = print_graph(program.graphs["prefill"], "prefill")
    return found


@pytest.mark.parametrize("name", ["InsertKVProjection", "InsertBypass"])
def test_graph_after(name: str, request: pytest.FixtureRequest) -> None:
    file, text = next((file, text) for file, text in texts().items() if name in file)
    if request.config.getoption("--update-graphs"):
        (GRAPHS / file).write_text(text, encoding="utf-8")
    assert numbered(text).splitlines() == numbered((GRAPHS / file).read_text(encoding="utf-8")).splitlines()


def test_only_a_pruned_layer_can_be_calibrated() -> None:
    program = three_layers().program.clone()
    with pytest.raises(ContractError, match=r"^InsertKVProjection: calibrated projections are for pruned layers"):
        PassManager(pruning([1], [1, 2])).run(program)


def test_a_layer_that_is_not_skipped_has_no_calibrated_projection() -> None:
    program = three_layers().prune([1], Calibration())
    with pytest.raises(ContractError, match="layer 1 "):
        PassManager([InsertKVProjection([1], [1])]).run(program)


# --- meaning -----------------------------------------------------------------------------------------------------

#: pruned, calibrated, bypassed
Choice = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
CHOICES: dict[str, Choice] = {
    "inner run, bypass": ((1, 2), (1, 2), (1,)),
    "inner run, first layer its own": ((1, 2), (2,), (1,)),
    "two runs": ((0, 2), (0, 2), (0, 2)),
    "two runs, one bypass": ((0, 2), (2,), (0,)),
    "last layers": ((2, 3), (2, 3), ()),
    "all": ((0, 1, 2, 3), (1, 2, 3), ()),
}


@cache
def maps(family: str, choice: Choice) -> Calibration:
    return random_maps(traced(family).model, choice[1], choice[2], seed=1)


def expected(
    model: PreTrainedModel, inputs: Inputs, pruned: tuple[int, ...], calibration: Calibration
) -> list[list[Tensor]]:
    """Every row alone, unpadded, through the reference: logits of the boundary token, then the cache."""
    projections, bypasses = reference_maps(calibration)
    found = []
    for i, n in enumerate(inputs.lengths):
        ids = inputs.ids[i : i + 1, :n]
        logits, kv = pop_prefill(model, ids, pruned, inputs.cache(i), projections, bypasses)
        found.append([logits[0], *(t[0] for layer in kv.layers for t in (layer.keys, layer.values))])
    return found


def prefill(found: Traced, pruned: tuple[int, ...], calibration: Calibration, inputs: Inputs) -> list[list[Tensor]]:
    """The prefill graph in PyTorch, by row."""
    return rows(inputs, run_graph(prefill_graph(found, found.prune(pruned, calibration)), inputs))


def prefill_graph(found: Traced, program: Program) -> fx.GraphModule:
    return materialise(program.graphs["prefill"], program, found.model.state_dict())


@cache
def pruned_program(family: str, name: str) -> Program:
    return traced(family).prune(CHOICES[name][0], maps(family, CHOICES[name]))


#: other kernels and orders of summation than transformers'; logits and cache entries are up to 10
TOLERANCE = 1e-4


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("llama", name) for name in CHOICES),
        *(("gemma3", name) for name in ("inner run, bypass", "two runs", "last layers")),
        *((family, name) for family in ("phi3", "olmo2") for name in ("inner run, bypass", "two runs, one bypass")),
    ],
)
def test_prefill_is_the_reference(family: str, name: str, past: int) -> None:
    found, choice = traced(family), CHOICES[name]
    calibration, inputs = maps(family, choice), make_inputs(found.model, [9, 4, 1], past)
    theirs = expected(found.model, inputs, choice[0], calibration)
    graph = prefill_graph(found, pruned_program(family, name))
    assert_close(rows(inputs, run_graph(graph, inputs)), theirs, TOLERANCE)
    # the maps matter: without them it is another prefill, but for a row that is its boundary token alone
    plain = expected(found.model, inputs, choice[0], Calibration())
    for i, (row, without) in enumerate(zip(theirs, plain, strict=True)):
        assert i == 2 or max(float((a - b).abs().max()) for a, b in zip(row, without, strict=True)) > 0.1


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "two runs, one bypass"),
        ("gemma3", "two runs"),
        ("phi3", "inner run, bypass"),
        ("olmo2", "inner run, bypass"),
    ],
)
def test_lowered_prefill_is_the_reference(family: str, name: str, tmp_path: Path) -> None:
    found, choice = traced(family), CHOICES[name]
    program, model = pruned_program(family, name).clone(), found.model
    PassManager(lowering()).run(program)
    uneven = make_inputs(model, [1, 1], 5)
    uneven.mask[1, 3:] = 0
    # ONNX Runtime's CPU kernel takes several tokens after a past for one row only
    given_inputs = [make_inputs(model, [9, 4]), make_inputs(model, [9], 3), uneven]
    results = run_onnx(tmp_path, Step(name, program, {}), "prefill", model, given_inputs)
    for inputs, result in zip(given_inputs, results, strict=True):
        theirs = expected(model, inputs, choice[0], maps(family, choice))
        assert_close(rows(inputs, result), theirs, TOLERANCE)


@pytest.mark.parametrize("past", [0, 3])
def test_only_position_0_takes_the_sink(past: int) -> None:
    found, pruned = traced("llama"), (1, 2)
    calibration = maps("llama", CHOICES["inner run, bypass"])
    other = Calibration(
        {layer: replace(m, sink=m.sink + 1) for layer, m in calibration.projections.items()},
        {first: replace(m, sink=m.sink + 1) for first, m in calibration.bypasses.items()},
    )
    inputs = make_inputs(found.model, [9, 4], past)
    one, two = (prefill(found, pruned, c, inputs) for c in (calibration, other))
    for ours, theirs in zip(one, two, strict=True):
        if past:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            continue
        value, changed = ours[1 + 2 * 1 + 1], theirs[1 + 2 * 1 + 1]  # layer 1's values: no norm, no RoPE
        torch.testing.assert_close(changed[:, :1] - value[:, :1], torch.ones_like(value[:, :1]))
        assert torch.equal(changed[:, 1:], value[:, 1:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_maps_that_are_the_layers_own_change_nothing(family: str) -> None:
    found, pruned = traced(family), (1, 2)
    inputs = make_inputs(found.model, [9, 4])
    inputs.ids[:, 0] = 5  # one first token: the sinks are its values
    cut = hidden_state(found.model, inputs.ids[:1, :1], 1)
    tokens = found.layers.tokens(Rows(inputs.ids[:1, :1]), torch.zeros(1, 1, dtype=torch.int64))
    own = {}
    for layer in pruned:
        both = own_projection(found.layers, layer).float()
        sink = torch.cat(found.layers.project(layer, cut, tokens), -1)[0, 0]
        own[layer] = AffineMap(both[:-1].T.contiguous(), both[-1], sink)
    ours = prefill(found, pruned, Calibration(own), inputs)
    assert_close(ours, prefill(found, pruned, Calibration(), inputs), TOLERANCE)  # the norm's scale is in the weights


def hidden_state(model: PreTrainedModel, ids: Tensor, layer: int) -> Tensor:
    """The residual stream before a layer, from transformers."""
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer]


def test_a_layer_without_input_norm_has_no_map_of_its_own() -> None:
    """Its keys grow with x, those of a map of x / rms(x) do not."""
    assert not own_projection(traced("olmo2").layers, 1).any()


@pytest.mark.parametrize("family", CONFIGS)
def test_calibration_leaves_the_boundary_token_and_decode_alone(family: str) -> None:
    """Only context tokens take maps: a prompt of one token gives the model's own logits, and decode has no map."""
    found = traced(family)
    inputs = make_inputs(found.model, [1])
    graph = prefill_graph(found, pruned_program(family, "inner run, bypass"))
    assert_close(rows(inputs, run_graph(graph, inputs)), expected(found.model, inputs, (), Calibration()), TOLERANCE)
    program = pruned_program(family, "inner run, bypass")
    parameters = {str(n.target) for n in program.graphs["decode"].graph.nodes if n.op == "get_attr"}
    assert not {p for p in parameters if p.startswith(("kv_projection.", "bypass."))}
    assert not find(program.graphs["decode"], role="bypass")


@pytest.mark.parametrize(
    "quantization", [None, Quantization(bits=4, block_size=16), Quantization(bits=8, dynamic=True)]
)
def test_both_stages_read_the_same_initializers(quantization: Quantization | None) -> None:
    """The boundary token takes decode's weights: the package holds them once."""
    program = three_layers().program.clone()
    PassManager([*pruning([1], [1], [1]), *lowering(quantization)]).run(program)
    prefill, decode = (
        {str(n.target) for n in program.graphs[stage].graph.nodes if n.op == "get_attr"}
        for stage in ("prefill", "decode")
    )
    assert decode <= prefill
    extra = {name.partition(".weight")[0].partition(".bias")[0].partition(".sink")[0] for name in prefill - decode}
    assert extra == {"kv_projection.1", "bypass.1", "kv_projection.norm"}


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    pruned = [layer for layer in range(4) if draw(st.booleans())]
    calibrated = [layer for layer in pruned if draw(st.booleans())]
    bypassed = [first for first, last in runs(pruned) if draw(st.booleans())]
    return tuple(pruned), tuple(calibrated), tuple(bypassed)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(choices(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([0, 4]), st.integers(0, 99))
def test_any_choice_is_the_reference(choice: Choice, lengths: list[int], past: int, seed: int) -> None:
    """Any layers pruned, any of them calibrated, any run bypassed, the last one too."""
    found = traced("llama")
    calibration = random_maps(found.model, choice[1], choice[2], seed)
    inputs = make_inputs(found.model, lengths, past, seed)
    ours = prefill(found, choice[0], calibration, inputs)
    assert_close(ours, expected(found.model, inputs, choice[0], calibration), TOLERANCE)
