"""Gemma-3's decoder, whose tokens of an image see all of it, through every pass and in ONNX Runtime, in fp32.

Compared with transformers' own modules and masks. Sliding layers see 12 tokens, and images have 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import image_attention_reference as reference
import onnx_ir
import pytest
import torch
from calibrated import random_maps, reference_maps
from compiled_decoder import CompiledDecoder, difference, empty_cache, run_decoder, run_session
from conftest import cache_tensors
from image_attention_reference import HIDDEN, Image, Prompt, embeddings_of, gemma3, make_prompt
from steps import GRAPHS, numbered
from torch import Tensor, fx
from torch.nn.functional import pad
from transformers import DynamicCache

from popcompile.export.onnx_graph import to_onnx
from popcompile.frontend.tracing import trace
from popcompile.package.graph_check import _Checker
from popcompile.passes import InsertVirtualGates, PassManager, canonicalization, lowering, ops, pruning
from popcompile.passes.drop_layers import DropLayers
from popcompile.passes.graph import find
from popcompile.passes.printing import print_graph
from popcompile.passes.split_stages import SplitStages

GEMMA = CompiledDecoder(gemma3())
#: fewer layers, of both kinds
SMALL = CompiledDecoder(gemma3(3))
PROMPTS: dict[str, list[reference.Part]] = {
    "no image": [9],
    "an image": [3, Image(), 5],
    "two": [2, Image(), 9, Image(), 4],
    "first": [Image(marked=False), 5],
    "last": [4, Image()],
    "with a mark between": [2, Image(), Image(), 3],
    "with nothing between": [2, Image(marked=False), Image(marked=False), 3],
    "behind a long text": [30, Image(), 14, Image(), 14],
}
#: in several blocks of attention, of which images are not parts
LONG: list[reference.Part] = [120, Image(), 5, Image(marked=False), Image(marked=False), 170, Image(), 30]
#: of what is largest in a tensor; sums run in another order than transformers'
TOLERANCE = 1e-4


@cache
def given(prompt: str) -> Tensor:
    """What the decoder is given of a prompt, [1, S, hidden + 1]."""
    return embeddings_of(GEMMA.model, make_prompt(PROMPTS[prompt]))


def inputs_of(wide: Tensor, cache: Sequence[Tensor]) -> list[Tensor]:
    """What a graph is given of one row, after a cache."""
    return [wide, torch.ones(1, cache[0].shape[2] + wide.shape[1], dtype=torch.int64), *cache]


def run(gm: fx.GraphModule, wide: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return run_decoder(gm, inputs_of(wide, cache))


def as_text(wide: Tensor) -> Tensor:
    """The same embeddings of a prompt that says of none that it is an image's."""
    return torch.cat((wide[:, :, :-1], torch.zeros_like(wide[:, :, -1:])), -1)


# --- where images end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_image", "past", "valid", "ends"),
    [
        pytest.param("...", 0, 3, [0, 1, 2], id="text"),
        pytest.param(".##.###.", 0, 8, [0, 2, 2, 3, 6, 6, 6, 7], id="two images"),
        pytest.param("##..", 5, 9, [6, 6, 7, 8], id="after a past"),
        pytest.param(".###", 0, 4, [0, 3, 3, 3], id="last"),
        pytest.param(".#####", 0, 4, [0, 3, 3, 3, 4, 5], id="padding that says it is an image"),
        pytest.param("#", 7, 8, [7], id="a token alone"),
    ],
)
def test_image_ends(is_image: str, past: int, valid: int, ends: list[int]) -> None:
    flags, mask = torch.tensor([[c == "#" for c in is_image]]), torch.zeros(1, past + len(is_image), dtype=torch.int64)
    mask[:, :valid] = 1
    positions = past + torch.arange(len(is_image))[None]
    assert ops.image_ends(flags, positions, mask).tolist() == [ends]


# --- tracing -----------------------------------------------------------------------------------------------------


def test_inputs() -> None:
    """Embeddings with a column that says which tokens are an image's, and no positions but the slots."""
    gm = GEMMA.canonical.graphs["model"]
    assert GEMMA.canonical.inputs == ["inputs_embeds", "attention_mask"]
    tokens, mask, *_ = (n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder")
    assert tokens.shape[2] == HIDDEN + 1 and tokens.shape[0] == mask.shape[0]
    attention = find(gm, op=ops.attention)
    assert [node.args[5] for node in attention] == [12, 12, 0, 12]
    assert {node.kwargs["ends"] for node in attention} == set(find(gm, op=ops.image_ends))


@pytest.mark.parametrize("name", ["InsertBoundaryRecompute.prefill", "LowerAttention.prefill"])
def test_graph_after(name: str, request: pytest.FixtureRequest) -> None:
    """As text: three layers, of which the second is pruned, and a window of 4 tokens."""
    program = trace(gemma3(3))
    compiler_pass, stage = name.split(".")
    passes = [*canonicalization(), *pruning((1,), window=4), *lowering()]
    last = next(i for i, p in enumerate(passes) if p.name == compiler_pass)
    PassManager(passes[: last + 1]).run(program)
    text, file = print_graph(program.graphs[stage], stage), GRAPHS / f"images-{name}.txt"
    if request.config.getoption("--update-graphs"):
        file.write_text(text, encoding="utf-8")
    assert numbered(text).splitlines() == numbered(file.read_text(encoding="utf-8")).splitlines()


# --- the whole model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_decode_graph_is_the_model(prompt: str) -> None:
    """From ids and pixels in transformers; a causal mask would be seen."""
    whole = make_prompt(PROMPTS[prompt])
    expected = reference.full_logits(GEMMA.model, whole)
    logits, _ = run(GEMMA.graph("decode"), given(prompt), empty_cache(GEMMA.canonical))
    assert difference([logits], [expected]) < TOLERANCE
    causal, _ = run(GEMMA.graph("decode"), as_text(given(prompt)), empty_cache(GEMMA.canonical))
    assert difference([causal], [reference.full_logits(GEMMA.model, whole, causal=True)]) < TOLERANCE
    assert (difference([causal], [logits]) > 0.01) == (prompt != "no image")


def test_a_window_is_no_wider_for_images() -> None:
    """An image's last tokens do not see its first ones in a sliding layer: the next layer's keys of them stay."""
    wide = given("an image")
    changed = wide.clone()
    changed[:, 4, :-1] += 1
    keys = [run(GEMMA.graph("decode"), w, empty_cache(GEMMA.canonical))[1][2][0] for w in (wide, changed)]
    moved = (keys[0] - keys[1]).abs().amax((0, 2)) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == list(range(4, 4 + reference.SLIDING_WINDOW))


# --- pruned prefill ----------------------------------------------------------------------------------------------

#: windows of 9 and 14 begin inside the last image, those of 30 before it
PRUNED = [((), 1), ((2, 3), 1), ((2, 3), 9), ((1, 3), 14), ((0,), 30), ((0, 1, 2, 3), 9)]


@pytest.mark.parametrize(("pruned", "window"), PRUNED)
def test_pruned_prefill_is_the_reference(pruned: tuple[int, ...], window: int) -> None:
    for prompt in ("two", "last"):
        require_reference(prompt, pruned, window)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 5, 9, 14, 17, 20, 30, 64])
@pytest.mark.parametrize("pruned", [(), (0,), (2,), (3,), (1, 2), (0, 3), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_every_pruned_prefill_is_the_reference(pruned: tuple[int, ...], window: int) -> None:
    for prompt in PROMPTS:
        require_reference(prompt, pruned, window)


def require_reference(prompt: str, pruned: tuple[int, ...], window: int) -> None:
    """The prompt's logits and cache, then three tokens."""
    wide, steps = given(prompt), []
    expected, kv = reference.pop_prefill(GEMMA.model, wide, pruned, window=window)
    logits, cache = run(GEMMA.graph("prefill", pruned, window), wide, empty_cache(GEMMA.canonical))
    steps.append(difference([logits, *cache], [expected, *cache_tensors(kv)]))
    for _ in range(3):
        token = text_of(int(expected[0, -1].argmax()))
        expected = reference.forward(GEMMA.model, token, kv)
        logits, cache = run(GEMMA.graph("decode", pruned, window), token, cache)
        steps.append(difference([logits, *cache], [expected, *cache_tensors(kv)]))
    assert max(steps) < TOLERANCE


def text_of(*ids: int) -> Tensor:
    return embeddings_of(GEMMA.model, Prompt(torch.tensor([ids]), None))


@pytest.mark.parametrize(("prompt", "pruned", "window"), [("two", (2, 3), 9), ("two", (2, 3), 30), ("last", (1, 2), 9)])
def test_what_a_causal_prefill_would_make(prompt: str, pruned: tuple[int, ...], window: int) -> None:
    """In layers that all tokens take, and in the tail's."""
    graph, wide = GEMMA.graph("prefill", pruned, window), given(prompt)
    expected, kv = reference.pop_prefill(GEMMA.model, wide, pruned, window=window)
    empty = empty_cache(GEMMA.canonical)
    assert difference([run(graph, as_text(wide), empty)[0]], [expected]) > 0.01
    if wide[0, -window, -1]:  # the tail begins inside an image
        context = torch.cat((wide[:, :-window], as_text(wide[:, -window:])), 1)
        assert difference(run(graph, context, empty)[1], cache_tensors(kv)) > 0.01


@pytest.mark.parametrize("window", [1, 9])
def test_a_later_turn_with_an_image(window: int) -> None:
    """After a past of text, a window of which ends in the image."""
    pruned, past = (1, 3), text_of(*range(3, 17))
    kv = DynamicCache()
    reference.forward(GEMMA.model, past, kv)
    _, cache = run(GEMMA.graph("decode"), past, empty_cache(GEMMA.canonical))
    for prompt in ("an image", "last"):
        again = DynamicCache()
        for layer, entry in enumerate(kv.layers):
            again.update(entry.keys, entry.values, layer)
        expected, again = reference.pop_prefill(GEMMA.model, given(prompt), pruned, window=window, cache=again)
        logits, after = run(GEMMA.graph("prefill", pruned, window), given(prompt), cache)
        assert difference([logits, *after], [expected, *cache_tensors(again)]) < TOLERANCE


@pytest.mark.parametrize("window", [1, 9])
def test_calibrated_maps_and_bypasses(window: int) -> None:
    wide, pruned, runs = given("last"), (0, 1, 3), {0: 1, 3: 3}
    calibration = random_maps(GEMMA.model.model.language_model, pruned, runs, seed=1)
    program = GEMMA.canonical.clone()
    program.constants |= calibration.constants()
    PassManager(pruning(pruned, pruned, runs, window)).run(program)
    logits, cache = run(GEMMA.with_weights(program, "prefill"), wide, empty_cache(program))
    projections, bypasses = reference_maps(calibration)
    at_ends = {runs[first]: bypass for first, bypass in bypasses.items()}
    expected, kv = reference.pop_prefill(
        GEMMA.model, wide, pruned, window=window, projections=projections, bypasses=at_ends
    )
    assert difference([logits, *cache], [expected, *cache_tensors(kv)]) < TOLERANCE


class Batch:
    """Rows of other images and lengths, padded on the right with what nobody may read, and what is expected of each."""

    def __init__(self, pruned: tuple[int, ...], window: int, decoder: CompiledDecoder = GEMMA) -> None:
        prompts = (PROMPTS[name] for name in ("two", "no image", "last", "an image"))
        rows = [embeddings_of(decoder.model, make_prompt(parts)) for parts in prompts]
        self.lengths = [row.shape[1] for row in rows]
        wide = [pad(row, (0, 0, 0, max(self.lengths) - row.shape[1]), value=9.0) for row in rows]
        mask = (torch.arange(max(self.lengths))[None] < torch.tensor(self.lengths)[:, None]).long()
        self.inputs = [torch.cat(wide), mask, *empty_cache(decoder.canonical, len(rows))]
        self.expected = [reference.pop_prefill(decoder.model, row, pruned, window=window) for row in rows]

    def require(self, logits: Tensor, cache: Sequence[Tensor]) -> None:
        for i, (length, (expected, kv)) in enumerate(zip(self.lengths, self.expected, strict=True)):
            ours = [logits[i : i + 1], *(t[i : i + 1, :, :length] for t in cache)]
            assert difference(ours, [expected, *cache_tensors(kv)]) < TOLERANCE


@pytest.mark.parametrize(("pruned", "window"), [((1, 3), 1), ((1, 3), 9), ((), 1)])
def test_batch_of_unequal_prompts(pruned: tuple[int, ...], window: int) -> None:
    batch = Batch(pruned, window)
    batch.require(*run_decoder(GEMMA.graph("prefill", pruned, window), batch.inputs))


# --- gates and dropped layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["two", "last"])
def test_closed_prefill_gates_prune(prompt: str) -> None:
    """A layer whose prefill gate is 0 adds nothing to context tokens."""
    program, pruned = GEMMA.canonical.clone(), (0, 3)
    PassManager([InsertVirtualGates()]).run(program)
    gates = torch.ones(program.num_layers, 2)
    gates[list(pruned), 0] = 0
    inputs = inputs_of(given(prompt), empty_cache(program))
    logits, cache = run_decoder(GEMMA.with_weights(program, "model"), [*inputs, gates])
    expected, kv = reference.pop_prefill(GEMMA.model, given(prompt), pruned)
    assert difference([logits[:, -1:], *cache], [expected, *cache_tensors(kv)]) < TOLERANCE


def test_dropped_layers() -> None:
    """The layers that are left are the model that has no others."""
    program = GEMMA.canonical.clone()
    PassManager([SplitStages(), DropLayers([1, 3])]).run(program)
    dropped = GEMMA.with_weights(program, "decode")
    logits, _ = run(dropped, given("two"), empty_cache(program))
    hooks = [
        GEMMA.model.model.language_model.layers[layer].register_forward_hook(lambda module, args, out: args[0])
        for layer in (1, 3)
    ]
    try:
        expected = reference.full_logits(GEMMA.model, make_prompt(PROMPTS["two"]))
    finally:
        for hook in hooks:
            hook.remove()
    assert difference([logits], [expected]) < TOLERANCE


# --- in ONNX Runtime ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pruned", "window", "provider"), [((1,), 1, "cpu"), ((0, 2), 9, "cpu"), ((0, 2), 9, "cuda")])
def test_onnx_is_the_model(pruned: tuple[int, ...], window: int, provider: str, tmp_path: Path) -> None:
    """Graphs for CUDA as well: they attend to more keys than there are, whose number its kernels ask for."""
    require_onnx(SMALL, pruned, window, tmp_path, provider)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_key_value_heads": 4}, id="heads of their own"),
        pytest.param({"head_dim": 12}, id="heads that are padded"),
        pytest.param({"head_dim": 8}, id="RoPE beside attention"),
        pytest.param({"sliding_window": 40}, id="a window wider than an image"),
        pytest.param({"sliding_window": 1}, id="the narrowest window"),
    ],
)
@pytest.mark.parametrize(("pruned", "window"), [((), 1), ((0, 1, 2), 1), ((1, 2), 5), ((0, 1), 30)])
def test_onnx_of_other_shapes(changes: dict[str, int], pruned: tuple[int, ...], window: int, tmp_path: Path) -> None:
    require_onnx(CompiledDecoder(gemma3(3, **changes)), pruned, window, tmp_path)


def require_onnx(
    decoder: CompiledDecoder, pruned: tuple[int, ...], window: int, folder: Path, provider: str = "cpu"
) -> None:
    """Both graphs of a split package are transformers' model, and its pruned prefill, and go on after it.

    Of prompts of one and of several blocks of attention. Heads may be wider in the cache, for kernels need it.
    """
    sessions, program = decoder.sessions(folder, pruned, window, provider), decoder.lowered(pruned, window)
    size = decoder.model.config.text_config.head_dim
    for parts in (*PROMPTS.values(), LONG):
        prompt = make_prompt(parts)
        wide, empty = embeddings_of(decoder.model, prompt), empty_cache(program)
        whole, _ = run_session(sessions["decode"], inputs_of(wide, empty))
        assert difference([whole], [reference.full_logits(decoder.model, prompt)]) < TOLERANCE
        expected, kv = reference.pop_prefill(decoder.model, wide, pruned, window=window)
        ours = run_session(sessions["prefill"], inputs_of(wide, empty))
        for stage in ("decode", "prefill", None):  # prefill is the whole model for one token
            assert difference([ours[0], *(t[..., :size] for t in ours[1])], [expected, *cache_tensors(kv)]) < TOLERANCE
            if stage:
                token = embeddings_of(decoder.model, Prompt(expected[:, -1].argmax(-1)[None], None))
                expected = reference.forward(decoder.model, token, kv)
                ours = run_session(sessions[stage], inputs_of(token, ours[1]))


@pytest.mark.parametrize("window", [1, 9])
def test_batch_in_onnx(window: int, tmp_path: Path) -> None:
    batch = Batch((1,), window, SMALL)
    batch.require(*run_session(SMALL.sessions(tmp_path, (1,), window)["prefill"], batch.inputs))


def test_fp16_in_onnx(tmp_path: Path) -> None:
    decoder, wide = CompiledDecoder(gemma3(3), torch.float16), embeddings_of(SMALL.model, make_prompt(PROMPTS["two"]))
    session = decoder.sessions(tmp_path, (1,), 9)["prefill"]
    inputs = inputs_of(wide, empty_cache(decoder.canonical))
    logits, cache = run_session(session, [t.half() if t.is_floating_point() else t for t in inputs])
    expected, kv = reference.pop_prefill(SMALL.model, wide, (1,), window=9)
    assert difference([t.float() for t in (logits, *cache)], [expected, *cache_tensors(kv)]) < 0.01


def test_a_later_turn_in_onnx(tmp_path: Path) -> None:
    pruned, window, parts = (1,), 9, [120, Image(), 40, Image(), 4]
    session = SMALL.sessions(tmp_path, pruned, window)["prefill"]
    past, wide = (embeddings_of(SMALL.model, make_prompt(p)) for p in ([150], parts))
    _, kv = reference.pop_prefill(SMALL.model, past, pruned, window=window)
    _, cache = run_session(session, inputs_of(past, empty_cache(SMALL.canonical)))
    expected, kv = reference.pop_prefill(SMALL.model, wide, pruned, window=window, cache=kv)
    logits, cache = run_session(session, inputs_of(wide, cache))
    assert difference([logits, *cache], [expected, *cache_tensors(kv)]) < TOLERANCE


def test_a_token_computes_nothing_for_images() -> None:
    """And prompts of one row and of several blocks share what says where images are: among all tokens, and in tails."""
    models = to_onnx(SMALL.lowered((1,), 9), ["prefill", "decode"], "cpu")
    for stage, sets in (("prefill", 2), ("decode", 1)):
        choice = models[stage].graph[-1]
        one, several = (choice.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
        kinds = [{n.op_type for n in onnx_ir.traversal.RecursiveGraphIterator(g)} for g in (one, several)]
        assert not kinds[0] & {"Loop", "MultiHeadAttention", "NonZero", "ScatterND", "CumSum"}
        assert {"Loop", "MultiHeadAttention", "ScatterND"} <= kinds[1]
        found = [n.op_type for n in several]
        assert found.count("ScatterND") == 3 and found.count("NonZero") == 1 + 2 * sets
    assert "ImageAttention" not in kinds[0] | kinds[1]


def test_a_package_may_have_these_graphs(tmp_path: Path) -> None:
    """What graph_check looks at: operators, their attributes, and that loops end."""
    SMALL.sessions(tmp_path, (1,), 9, "cuda")
    manifest = SimpleNamespace(
        num_kv_heads=2, head_size=16, weights="weights.onnx.data",
        files={"weights.onnx.data": {"size": (tmp_path / "weights.onnx.data").stat().st_size}},
    )  # fmt: skip
    for stage in ("prefill", "decode"):
        model = onnx_ir.to_proto(onnx_ir.load(tmp_path / f"{stage}.onnx"))
        _Checker(manifest).check(model.graph, {}, 0)  # type: ignore[arg-type]  # the parts of a manifest that it reads
