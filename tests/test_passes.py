"""Every pass: the graph before and after as text, its contract, and that it keeps the meaning it promises to keep.

The texts in tests/graphs/NN-Pass.stage.txt are the graphs after each pass, of a tiny Llama with two layers of which
the second is pruned; a pass's graph before is the file before it. `inner-NN-...` shows the pruning passes on three
layers whose middle one is pruned. A graph that a pass leaves as it was has no file. Rewrite them with

    pytest tests/test_passes.py --update-graphs
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import (
    Inputs,
    make_inputs,
    materialise,
    run_graph,
    tiny_gemma3,
    tiny_llama,
    tiny_model,
    transformers_forward,
)
from reference import pop_prefill
from torch import Tensor, fx
from transformers import PreTrainedConfig, PreTrainedModel

from popcompile.export.onnx_graph import to_onnx
from popcompile.export.weights import write_weights
from popcompile.passes import ContractError, Pass, PassManager, Program, lowering, ops, transformations
from popcompile.passes.annotate_layers import AnnotateLayers
from popcompile.passes.cleanup import Cleanup
from popcompile.passes.fold_parameters import FoldParameters
from popcompile.passes.fuse_rms_norm import FuseRMSNorm
from popcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding
from popcompile.passes.graph import clone_module, find, inputs_of, outputs_of, replace
from popcompile.passes.insert_boundary_recompute import InsertBoundaryRecompute
from popcompile.passes.insert_bypass import InsertBypass
from popcompile.passes.insert_kv_projection import InsertKVProjection
from popcompile.passes.lower_attention import LowerAttention
from popcompile.passes.lower_linear import LowerLinear
from popcompile.passes.lower_rms_norm import LowerRMSNorm
from popcompile.passes.lower_rotary_embedding import LowerRotaryEmbedding
from popcompile.passes.normalize import Normalize
from popcompile.passes.printing import print_graph
from popcompile.passes.prune_lm_head import PruneLMHead
from popcompile.passes.prune_prefill import PrunePrefill
from popcompile.passes.split_stages import SplitStages
from popcompile.tracing import trace

GRAPHS = Path(__file__).parent / "graphs"
PASSES = ["Traced", *(p.name for p in [*transformations([]), *lowering()][:-1]), "LastCleanup"]


@dataclass
class Step:
    """A program after one pass."""

    name: str
    program: Program
    texts: dict[str, str]

    def copy(self) -> Program:
        """The program, free to be changed."""
        graphs = {stage: clone_module(gm) for stage, gm in self.program.graphs.items()}
        return Program(
            graphs, self.program.num_layers, self.program.max_positions, self.program.constants,
            dict(self.program.derived),
        )  # fmt: skip


def compile_in_steps(config: PreTrainedConfig, pruned: Iterable[int]) -> dict[str, Step]:
    """The program after tracing and after every pass, by pass name."""
    program = trace(copy.deepcopy(config))
    steps: dict[str, Step] = {}
    for name, compiler_pass in zip(PASSES, [None, *transformations(pruned), *lowering()], strict=True):
        if compiler_pass is not None:
            PassManager([compiler_pass]).run(program)
        texts = {stage: print_graph(gm, stage) for stage, gm in program.graphs.items()}
        step = Step(name, program, texts)
        steps[name] = Step(name, step.copy(), texts)
    return steps


@cache
def llama_steps() -> dict[str, Step]:
    return compile_in_steps(tiny_llama(), [1])


@cache
def inner_steps() -> dict[str, Step]:
    return compile_in_steps(tiny_llama(num_hidden_layers=3), [1])


def before(steps: dict[str, Step], name: str) -> Step:
    """The step before a pass."""
    names = list(steps)
    return steps[names[names.index(name) - 1]]


# --- (a) before and after, as text -------------------------------------------------------------------------------

INNER = ["PrunePrefill", "InsertKVProjection", "InsertBoundaryRecompute", "PruneLMHead"]


def changed_texts(steps: dict[str, Step], name: str, prefix: str = "") -> dict[str, str]:
    """File name -> text of every graph that a pass changed."""
    earlier = before(steps, name).texts if name != "Traced" else {}
    return {
        f"{prefix}{PASSES.index(name):02d}-{name}.{stage}.txt": text
        for stage, text in steps[name].texts.items()
        if text.split("\n", 1)[1] != earlier.get(stage, "\n").split("\n", 1)[1]  # the first line names the stage
    }


def numbered(text: str) -> str:
    """The text with values numbered in order: torch counts mul, mul_1, ... differently from version to version."""
    names: dict[str, str] = {}
    for name in re.findall(r"^    (\w+)(?: =|:) ", text, re.MULTILINE):
        stem = re.sub(r"_\d+$", "", name) if not name.startswith("past_key_values") else name
        names[name] = f"{stem}.{sum(n.startswith(stem + '.') for n in names.values())}"
    lines = [line.partition("  # ") for line in text.splitlines()]
    value = re.compile(r"(?<![\w.])(\w+)(?![\w.(=])")
    return "\n".join(value.sub(lambda m: names.get(m[1], m[1]), code) + mark + rest for code, mark, rest in lines)


@pytest.fixture(scope="session")
def expected_graphs(request: pytest.FixtureRequest) -> dict[str, str]:
    """The files of tests/graphs; with --update-graphs, after they were written anew."""
    if request.config.getoption("--update-graphs"):
        GRAPHS.mkdir(exist_ok=True)
        for old in GRAPHS.glob("*.txt"):
            if not old.name.startswith("calibrated-"):  # those are test_calibrated_passes.py's
                old.unlink()
        for name in PASSES:
            for file, text in changed_texts(llama_steps(), name).items():
                (GRAPHS / file).write_text(text, encoding="utf-8")
        for name in INNER:
            for file, text in changed_texts(inner_steps(), name, "inner-").items():
                (GRAPHS / file).write_text(text, encoding="utf-8")
    return {path.name: path.read_text(encoding="utf-8") for path in GRAPHS.glob("*.txt")}


def compare(expected: dict[str, str], actual: dict[str, str], pattern: str) -> None:
    files = sorted(name for name in expected if re.fullmatch(pattern, name))
    assert files == sorted(actual), "another set of graphs changed; pytest --update-graphs rewrites tests/graphs"
    for file, text in actual.items():
        assert numbered(text).splitlines() == numbered(expected[file]).splitlines(), f"tests/graphs/{file}"


@pytest.mark.parametrize("name", PASSES)
def test_graph_after(name: str, expected_graphs: dict[str, str]) -> None:
    recorded = torch.__version__.startswith("2.13.") and transformers.__version__.startswith("5.23.")
    if name in ("Traced", "Normalize", "FuseRMSNorm") and not recorded:
        pytest.skip("versions of torch and transformers write RoPE differently; FuseRotaryEmbedding makes it one")
    compare(expected_graphs, changed_texts(llama_steps(), name), rf"\d\d-{name}\..*")


@pytest.mark.parametrize("name", INNER)
def test_graph_after_pruning_an_inner_layer(name: str, expected_graphs: dict[str, str]) -> None:
    compare(expected_graphs, changed_texts(inner_steps(), name, "inner-"), rf"inner-\d\d-{name}\..*")


def test_cleanup_removes_what_is_dead_or_computed_twice() -> None:
    """The graphs above have nothing to clean: give them something."""
    program = before(llama_steps(), "Cleanup").copy()
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
    twice = before(llama_steps(), "PrunePrefill").copy()
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


# --- (b) contracts -----------------------------------------------------------------------------------------------


@dataclass
class Breach:
    """A graph that breaks a pass's contract: the program before `at` (after it, for ensures), damaged."""

    compiler_pass: Callable[[], Pass]
    damage: Callable[[Program, fx.GraphModule], object]
    message: str
    ensures: bool = False
    at: str = ""
    stage: str = ""


def nothing(program: Program, gm: fx.GraphModule) -> None:
    """The graph is wrong for the pass as it is."""


def drop(op: object, by_argument: int) -> Callable[[Program, fx.GraphModule], None]:
    """Erase the first node of an operator."""

    def damage(program: Program, gm: fx.GraphModule) -> None:
        node = find(gm, op=op)[0]
        replace(node, node.args[by_argument])

    return damage


def use_before_definition(program: Program, gm: fx.GraphModule) -> None:
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    outputs_of(gm)[0].append(first)


def call_a_method(program: Program, gm: fx.GraphModule) -> None:
    logits = outputs_of(gm)[0]
    with gm.graph.inserting_after(logits):
        called = gm.graph.call_method("relu", (logits,))
    logits.replace_all_uses_with(called, delete_user_cb=lambda user: user is not called)


def forget_module_paths(program: Program, gm: fx.GraphModule) -> None:
    for node in find(gm, op=ops.attention)[1:]:
        del node.meta["nn_module_stack"]


def query_from_nowhere(program: Program, gm: fx.GraphModule) -> None:
    find(gm, op=ops.attention)[0].update_arg(0, inputs_of(gm)["past_key_values_0_key"])


def attend_to_an_input(program: Program, gm: fx.GraphModule) -> None:
    find(gm, op=ops.attention)[0].update_arg(1, inputs_of(gm)["past_key_values_0_key"])


def two_heads(program: Program, gm: fx.GraphModule) -> None:
    find(gm, role="o_proj")[0].meta["role"] = "lm_head"


def two_positions(program: Program, gm: fx.GraphModule) -> None:
    positions = find(gm, op=ops.token_positions)[0]
    with gm.graph.inserting_after(positions):
        gm.graph.node_copy(positions)


def no_decode(program: Program, gm: fx.GraphModule) -> None:
    del program.graphs["decode"]


def return_the_past(program: Program, gm: fx.GraphModule) -> None:
    """The last layer's projected keys and values are computed for nobody."""
    for kind in ("key", "value"):
        append = find(gm, op=ops.append_kv, layer=1)[0]
        replace(append, inputs_of(gm)[f"past_key_values_1_{kind}"])


def project_from_a_deeper_layer(program: Program, gm: fx.GraphModule) -> None:
    find(gm, role="kv_projection/input_norm")[0].args[0].meta["layer"] = 2


def tell_apart(program: Program, gm: fx.GraphModule) -> None:
    outputs_of(program.graphs["decode"])[0]._rename("another")


BREACHES = {
    "Normalize": Breach(Normalize, call_a_method, "the graph must be one flat torch.export graph"),
    "Normalize, after": Breach(Normalize, nothing, "an identity is left", ensures=True, at="Traced"),
    "FuseRMSNorm": Breach(FuseRMSNorm, use_before_definition, "was used before it has been defined"),
    "FuseRMSNorm, after": Breach(FuseRMSNorm, drop(ops.rms_norm, 0), "a fused norm is missing", ensures=True),
    "FuseRotaryEmbedding": Breach(FuseRotaryEmbedding, two_positions, "the graph needs one token_positions node"),
    "FuseRotaryEmbedding, after": Breach(
        FuseRotaryEmbedding, drop(ops.rotary_embedding, 0), "a fused embedding is missing", ensures=True
    ),
    "AnnotateLayers": Breach(
        AnnotateLayers,
        lambda p, gm: (drop(ops.attention, 0)(p, gm), drop(ops.attention, 0)(p, gm)),
        "the graph has no attention node",
    ),
    "AnnotateLayers, layers": Breach(AnnotateLayers, forget_module_paths, r"attention nodes are in layers \[0, None\]"),
    "AnnotateLayers, query": Breach(AnnotateLayers, query_from_nowhere, "q does not come from a projection"),
    "AnnotateLayers, after": Breach(AnnotateLayers, two_heads, r"no o_proj in layers \[0\]", ensures=True),
    "SplitStages": Breach(SplitStages, nothing, "the program is split already", at="PrunePrefill"),
    "SplitStages, after": Breach(SplitStages, tell_apart, "the stages differ already", ensures=True),
    "PrunePrefill": Breach(lambda: PrunePrefill([1, 7]), nothing, r"has 2 layers, asked to prune \[7\]"),
    "PrunePrefill, twice": Breach(
        lambda: PrunePrefill([1]), nothing, "layers are missing already", at="InsertKVProjection"
    ),
    "PrunePrefill, after": Breach(lambda: PrunePrefill([0]), nothing, "a pruned layer still attends", ensures=True),
    "PrunePrefill, cache": Breach(
        lambda: PrunePrefill([1]), return_the_past, "a layer lost its K/V cache entry", ensures=True
    ),
    "InsertKVProjection": Breach(
        lambda: InsertKVProjection([1]), nothing, r"layer 1 still computes \[.*'attention_1'.*\]", at="PrunePrefill"
    ),
    "InsertKVProjection, after": Breach(
        lambda: InsertKVProjection([1]), project_from_a_deeper_layer, r"layer 1's K/V depend on \['add", ensures=True
    ),
    "InsertBoundaryRecompute": Breach(InsertBoundaryRecompute, no_decode, "there is no decode graph to copy"),
    "InsertBoundaryRecompute, twice": Breach(
        InsertBoundaryRecompute, nothing, "the boundary token has its way already", at="PruneLMHead"
    ),
    "InsertBoundaryRecompute, after": Breach(
        InsertBoundaryRecompute, nothing, "still skipped by every token", ensures=True, at="InsertKVProjection"
    ),
    "InsertBypass": Breach(lambda: InsertBypass([1], [0]), nothing, r"no run of pruned layers begins at \[0\]"),
    "InsertBypass, too early": Breach(
        lambda: InsertBypass([1], [1]), nothing, "the boundary token has no way yet", at="InsertKVProjection"
    ),
    "InsertBypass, after": Breach(lambda: InsertBypass([1], [1]), nothing, "a run lacks its bypass", ensures=True),
    "PruneLMHead": Breach(PruneLMHead, two_heads, "the graph needs one lm_head"),
    "PruneLMHead, after": Breach(
        PruneLMHead, nothing, r"logits are .*, not \[batch, 1, vocabulary\]", ensures=True, at="InsertBoundaryRecompute"
    ),
    "Cleanup": Breach(Cleanup, use_before_definition, "was used before it has been defined"),
    "LowerAttention": Breach(LowerAttention, attend_to_an_input, "attention reads no cache of its own"),
    "LowerAttention, after": Breach(LowerAttention, nothing, r"\['attention', .* left", ensures=True, at="Cleanup"),
    "LowerRotaryEmbedding": Breach(
        LowerRotaryEmbedding, nothing, "attention is lowered first: it takes RoPE's layout along", at="LowerAttention"
    ),
    "LowerRotaryEmbedding, after": Breach(
        LowerRotaryEmbedding, nothing, "a rotary_embedding is left", ensures=True, at="Cleanup"
    ),
    "LowerRMSNorm": Breach(LowerRMSNorm, use_before_definition, "was used before it has been defined"),
    "LowerRMSNorm, after": Breach(LowerRMSNorm, nothing, "an rms_norm is left", ensures=True, at="Cleanup"),
    "LowerLinear": Breach(LowerLinear, use_before_definition, "was used before it has been defined"),
    "LowerLinear, after": Breach(LowerLinear, nothing, "a linear is left", ensures=True, at="Cleanup"),
    "FoldParameters": Breach(FoldParameters, use_before_definition, "was used before it has been defined"),
    "FoldParameters, after": Breach(
        FoldParameters, nothing, "an expression of parameters alone is left", ensures=True, at="LowerLinear"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREACHES)
def test_contract(case: str) -> None:
    breach = BREACHES[case]
    name = case.split(",")[0]
    at = breach.at or name
    program = (llama_steps()[at] if breach.ensures else before(llama_steps(), at)).copy()
    compiler_pass = breach.compiler_pass()
    compiler_pass.program = program
    compiler_pass.matches = {"FuseRMSNorm": 5, "FuseRotaryEmbedding": 4}.get(name, 0) if breach.ensures else 0
    gm = next(iter(program.graphs.values()))  # model, later prefill
    breach.damage(program, gm)
    with pytest.raises(ContractError, match=rf"^{name}: .*{breach.message}"):
        (compiler_pass.ensures if breach.ensures else compiler_pass)(gm)


def test_every_pass_has_a_contract() -> None:
    assert {case.split(",")[0] for case in BREACHES} == {p.name for p in [*transformations([]), *lowering()]}


# --- (c) meaning -------------------------------------------------------------------------------------------------

#: prompts of 9 and 4 tokens after 3, so that Gemma's window of 8 slides and one row is padded
LENGTHS, PAST = [9, 4], 3
CONFIGS = {"llama": tiny_llama(), "gemma3": tiny_gemma3()}
PRUNED = {"llama": [1], "gemma3": [1]}
Result = tuple[Tensor, list[Tensor]]


@cache
def compiled(family: str) -> tuple[PreTrainedModel, dict[str, Step]]:
    return tiny_model(CONFIGS[family]), compile_in_steps(CONFIGS[family], PRUNED[family])


def run_step(family: str, name: str, stage: str, inputs: Inputs) -> Result:
    model, steps = compiled(family)
    program = steps[name].program
    gm = program.graphs.get(stage) or program.graphs["model"]
    return run_graph(materialise(gm, program, model.state_dict()), inputs)


@cache
def prompts(family: str) -> Inputs:
    return make_inputs(compiled(family)[0], LENGTHS, PAST)


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


def full_model(model: PreTrainedModel, inputs: Inputs) -> list[list[Tensor]]:
    """Every row alone, unpadded, through transformers' module."""
    found = []
    for i, n in enumerate(inputs.lengths):
        logits, kv = transformers_forward(model, inputs.ids[i : i + 1, :n], inputs.cache(i))
        found.append([logits[0], *(t[0] for t in kv)])
    return found


def pop(model: PreTrainedModel, inputs: Inputs, pruned: Iterable[int]) -> list[list[Tensor]]:
    """Every row alone, unpadded, through the reference; logits of the boundary token."""
    found = []
    for i, n in enumerate(inputs.lengths):
        logits, kv = pop_prefill(model, inputs.ids[i : i + 1, :n], pruned, inputs.cache(i))
        found.append([logits[0], *(t[0] for layer in kv.layers for t in (layer.keys, layer.values))])
    return found


FULL = {
    "Traced": ["model"],
    "Normalize": ["model"],
    "FuseRMSNorm": ["model"],
    "FuseRotaryEmbedding": ["model"],
    "AnnotateLayers": ["model"],
    "SplitStages": ["prefill", "decode"],
    "Cleanup": ["decode"],  # what prunes prefill leaves decode alone
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stages in FULL.items() for stage in stages])
def test_full_graph_is_the_model(family: str, name: str, stage: str) -> None:
    inputs = prompts(family)
    ours = rows(inputs, run_step(family, name, stage, inputs))
    # transformers attends without our mask, in another order of summation
    assert_close(ours, full_model(compiled(family)[0], inputs), 1e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("Normalize", "model"),
        ("FuseRMSNorm", "model"),
        ("FuseRotaryEmbedding", "model"),
        ("AnnotateLayers", "model"),
        ("SplitStages", "prefill"),
        ("SplitStages", "decode"),
        ("InsertKVProjection", "prefill"),
        ("PruneLMHead", "decode"),
        ("Cleanup", "prefill"),
        ("Cleanup", "decode"),
    ],
)
def test_pass_changes_no_bit(family: str, name: str, stage: str) -> None:
    """The same arithmetic in the same order, padding included."""
    inputs = prompts(family)
    logits, kv = run_step(family, name, stage, inputs)
    logits_before, kv_before = run_step(family, before(compiled(family)[1], name).name, stage, inputs)
    for a, b in zip([logits, *kv], [logits_before, *kv_before], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", CONFIGS)
def test_lm_head_gives_the_boundary_tokens_logits(family: str) -> None:
    inputs = prompts(family)
    logits, kv = run_step(family, "PruneLMHead", "prefill", inputs)
    all_logits, kv_before = run_step(family, "InsertBoundaryRecompute", "prefill", inputs)
    boundary = torch.stack([all_logits[i, n - 1 : n] for i, n in enumerate(LENGTHS)])
    assert logits.shape == boundary.shape
    torch.testing.assert_close(logits, boundary, rtol=0, atol=1e-5)  # a matrix product of fewer rows sums otherwise
    assert all(torch.equal(a, b) for a, b in zip(kv, kv_before, strict=True))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["PruneLMHead", "Cleanup"])
def test_prefill_is_the_reference(family: str, name: str) -> None:
    model = compiled(family)[0]
    inputs = prompts(family)
    ours = rows(inputs, run_step(family, name, "prefill", inputs))
    expected = pop(model, inputs, PRUNED[family])
    assert_close(ours, expected, 1e-5)
    skipped = rows(inputs, run_step(family, "InsertKVProjection", "prefill", inputs))
    for pruned, boundary_skips in zip(expected, skipped, strict=True):  # the boundary's way shows in the logits
        assert (pruned[0] - boundary_skips[0][-1:]).abs().max() > 0.1


def test_pruning_an_inner_layer_changes_what_follows() -> None:
    """So that agreement with the reference says something: the pruned model is another one."""
    model = compiled("gemma3")[0]
    inputs = prompts("gemma3")
    for ours, full in zip(pop(model, inputs, [1]), full_model(model, inputs), strict=True):
        assert (ours[0] - full[0][-1:]).abs().max() > 0.1
        assert (ours[-1] - full[-1]).abs().max() > 0.1


# Lowered graphs hold ONNX operators and run in ONNX Runtime alone.


def run_onnx(folder: Path, step: Step, stage: str, model: PreTrainedModel, inputs: list[Inputs]) -> list[Result]:
    program, weights = step.program, model.state_dict()
    onnx_model = to_onnx(program.graphs[stage], program.num_layers, stage)
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


def onnx_prompts(family: str) -> list[Inputs]:
    """ONNX Runtime's CPU kernel takes several tokens after a past for one row only."""
    model = compiled(family)[0]
    uneven = make_inputs(model, [1, 1], 5)  # pasts of 5 and 2 tokens, as in a batch that is being decoded
    uneven.mask[1, 3:] = 0
    return [make_inputs(model, LENGTHS), make_inputs(model, [9], PAST), make_inputs(model, [1, 1], PAST), uneven]


LOWERED = ["LowerAttention", "LowerRotaryEmbedding", "LowerRMSNorm", "LowerLinear", "FoldParameters"]


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in LOWERED), ("llama", "LastCleanup"), ("gemma3", "LastCleanup")]
)
def test_lowered_prefill_is_the_reference(family: str, name: str, tmp_path: Path) -> None:
    model, steps = compiled(family)
    inputs = onnx_prompts(family)
    for given, result in zip(inputs, run_onnx(tmp_path, steps[name], "prefill", model, inputs), strict=True):
        # other kernels; logits are up to 10
        assert_close(rows(given, result), pop(model, given, PRUNED[family]), 1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_lowered_decode_is_the_model(family: str, tmp_path: Path) -> None:
    model, steps = compiled(family)
    inputs = onnx_prompts(family)
    for given, result in zip(inputs, run_onnx(tmp_path, steps["LastCleanup"], "decode", model, inputs), strict=True):
        assert_close(rows(given, result), full_model(model, given), 1e-4)
