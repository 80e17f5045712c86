"""Every pass: the graph before and after, as text.

The texts in tests/passes/graphs/Pass.stage.txt are the graphs after each pass, of a tiny Llama with two layers of which
the second is pruned; a pass's graph before is that of the pass before it. `inner-...` shows the pruning passes on three
layers whose middle one is pruned. A graph that a pass leaves as it was has no file. Rewrite them with

    pytest tests/passes/test_passes.py --update-graphs
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_llama
from steps import GRAPHS, PASSES, Step, before, compile_in_steps, llama_steps, numbered
from torch import fx
from torch.onnx.ops import symbolic

from popcompile.frontend.tracing import trace
from popcompile.passes import ContractError, PassManager, lowering, transformations
from popcompile.passes.cleanup import Cleanup
from popcompile.passes.flops import node_flops
from popcompile.passes.graph import find
from popcompile.passes.insert_kv_projection import InsertKVProjection
from popcompile.passes.pack_qkv import PARTS, PackQKV, part_features
from popcompile.passes.printing import print_graph
from popcompile.passes.prune_prefill import PrunePrefill


@cache
def inner_steps() -> dict[str, Step]:
    return compile_in_steps(tiny_llama(num_hidden_layers=3), [1])


INNER = ["PrunePrefill", "InsertKVProjection", "InsertBoundaryRecompute", "PruneLMHead"]


@cache
def window_steps() -> dict[str, Step]:
    return compile_in_steps(tiny_llama(), [1], window=4)


#: passes that see how many tokens take the whole model
WINDOW = ["InsertBoundaryRecompute", "PruneLMHead", "LowerAttention"]


def changed_texts(steps: dict[str, Step], name: str, prefix: str = "") -> dict[str, str]:
    """File name -> text of every graph that a pass changed."""
    earlier = before(steps, name).texts if name != "Traced" else {}
    return {
        f"{prefix}{name}.{stage}.txt": text
        for stage, text in steps[name].texts.items()
        if text.split("\n", 1)[1] != earlier.get(stage, "\n").split("\n", 1)[1]  # the first line names the stage
    }


@pytest.fixture(scope="session")
def expected_graphs(request: pytest.FixtureRequest) -> dict[str, str]:
    """The files of tests/passes/graphs; with --update-graphs, after they were written anew."""
    if request.config.getoption("--update-graphs"):
        GRAPHS.mkdir(exist_ok=True)
        for old in GRAPHS.glob("*.txt"):
            if not old.name.startswith(
                ("calibrated-", "quantized-", "vision-")
            ):  # those are of the files of tests of those names
                old.unlink()
        for name in PASSES:
            for file, text in changed_texts(llama_steps(), name).items():
                (GRAPHS / file).write_text(text, encoding="utf-8")
        for name in INNER:
            for file, text in changed_texts(inner_steps(), name, "inner-").items():
                (GRAPHS / file).write_text(text, encoding="utf-8")
        for name in WINDOW:
            for file, text in changed_texts(window_steps(), name, "window-").items():
                (GRAPHS / file).write_text(text, encoding="utf-8")
    return {path.name: path.read_text(encoding="utf-8") for path in GRAPHS.glob("*.txt")}


def compare(expected: dict[str, str], actual: dict[str, str], pattern: str) -> None:
    files = sorted(name for name in expected if re.fullmatch(pattern, name))
    assert files == sorted(actual), "another set of graphs changed; pytest --update-graphs rewrites tests/passes/graphs"
    for file, text in actual.items():
        assert numbered(text).splitlines() == numbered(expected[file]).splitlines(), f"tests/passes/graphs/{file}"


@pytest.mark.parametrize("name", PASSES)
def test_graph_after(name: str, expected_graphs: dict[str, str]) -> None:
    recorded = torch.__version__.startswith("2.13.") and transformers.__version__.startswith(("5.23.", "5.24."))
    if name in ("Traced", "Normalize", "FuseRMSNorm") and not recorded:
        pytest.skip("versions of torch and transformers write RoPE differently; FuseRotaryEmbedding makes it one")
    compare(expected_graphs, changed_texts(llama_steps(), name), rf"{name}\..*")


@pytest.mark.parametrize("name", INNER)
def test_graph_after_pruning_an_inner_layer(name: str, expected_graphs: dict[str, str]) -> None:
    compare(expected_graphs, changed_texts(inner_steps(), name, "inner-"), rf"inner-{name}\..*")


@pytest.mark.parametrize("name", WINDOW)
def test_graph_with_a_window(name: str, expected_graphs: dict[str, str]) -> None:
    compare(expected_graphs, changed_texts(window_steps(), name, "window-"), rf"window-{name}\..*")


def test_cleanup_removes_what_is_dead_or_computed_twice() -> None:
    """The graphs above have nothing to clean: give them something."""
    program = before(llama_steps(), "Cleanup").program.clone()
    gm = program.graphs["prefill"]
    norm = find(gm, role="input_norm")[0]
    with gm.graph.inserting_after(norm):
        again = gm.graph.node_copy(norm)
    find(gm, role="q_proj")[0].update_arg(0, again)
    with gm.graph.inserting_after(again):
        gm.graph.node_copy(norm)  # read by nobody
    cleanup = Cleanup()
    PassManager([cleanup]).run(program)
    assert numbered(print_graph(program.graphs["prefill"])) == numbered(
        llama_steps()["Cleanup"].texts["prefill"].replace("def prefill", "def graph")
    )
    assert cleanup.matches == 2


def test_a_layer_named_twice_is_pruned_once() -> None:
    twice = before(llama_steps(), "PrunePrefill").program.clone()
    PassManager([PrunePrefill([1, 1]), InsertKVProjection([1, 1])]).run(twice)
    assert print_graph(twice.graphs["prefill"], "prefill") == llama_steps()["InsertKVProjection"].texts["prefill"]


def test_texts_are_the_same_in_every_run() -> None:
    again = compile_in_steps(tiny_llama(), [1])
    for name, step in llama_steps().items():
        assert again[name].texts == step.texts


def test_manager_records_and_shows_every_pass() -> None:
    program, seen = trace(tiny_llama()), []
    passes = [*transformations([1]), *lowering()]
    records = PassManager(passes, observe=lambda *what: seen.append(what)).run(program)
    assert [r.name for r in records] == [p.name for p in passes]
    for earlier, later in pairwise(records):
        assert (earlier.nodes_after, earlier.flops_after) == (later.nodes_before, later.flops_before)
    by_name = {r.name: r for r in records[:-1]}
    assert by_name["PrunePrefill"].matches == 1
    assert by_name["FuseRMSNorm"].matches == 5
    assert by_name["FuseRotaryEmbedding"].matches == 4
    assert records[-1].flops_after["prefill"] < 0.6 * records[0].flops_before["prefill"]
    fused = next(r for r in records if r.name == "FuseRotaryEmbedding")  # versions compute RoPE with or without matmul
    assert records[-1].flops_after["decode"] == fused.flops_after["decode"]
    steps = llama_steps()
    for index, _, stage, old, new in seen:
        name = PASSES[index + 1]
        earlier = before(steps, name).texts
        assert new == steps[name].texts[stage]
        assert old == earlier.get(stage, earlier.get("model"))


def test_packed_projections_come_apart_as_they_were_put_together() -> None:
    program = before(llama_steps(), "PackQKV").program.clone()
    PassManager([PackQKV()]).run(program)
    packed = [n for n in find(program.graphs["decode"], role="qkv_proj") if len(n.all_input_nodes) > 1]
    assert packed
    for node in packed:
        parts = node.args[1].args[0]
        assert [str(part.target).split(".")[-2] for part in parts] == list(PARTS)
        sizes = [part.meta["val"].shape[0] for part in parts]
        assert [len(range(sum(sizes))[part_features(role, sum(sizes), sizes[1])]) for role in PARTS] == sizes


@pytest.mark.parametrize("operator", ["com.microsoft::FusedConv", "Softmax", torch.ops.aten.convolution.default])
def test_an_operator_without_a_formula_is_not_free(operator: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    of_onnx = isinstance(operator, str)
    node = graph.call_function(symbolic, (operator, [x], {})) if of_onnx else graph.call_function(operator, (x,))
    with pytest.raises(ContractError, match="has no formula for its FLOPs"):
        node_flops(node, {}, 1)
