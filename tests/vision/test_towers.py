"""Vision graphs in ONNX Runtime compute what transformers' towers do, for images of any size and number."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from torch.utils.flop_counter import FlopCounterMode
from vision import (
    MERGE,
    Graphs,
    close,
    patches,
    side_by_side,
    tiny_qwen3_vl,
)

from popcompile.errors import PopcompileError
from popcompile.package.graph_check import _Checker
from popcompile.passes.flops import REFERENCE_IMAGE_TOKENS, flops_by_layer, image_flops
from popcompile.passes.printing import print_graph
from popcompile.upstream import attention_implementation
from popcompile.vision.towers import embedding_width
from popcompile.vision.tracing import build_model, trace_images

#: none of which the graph was traced with
GRIDS = {
    "one image": [[1, 4, 6]],
    "one token": [[1, MERGE, MERGE]],
    "a row of tokens": [[1, 2, 12]],
    "three images": [[1, 16, 10]] * 3,
    "larger than the table of positions": [[1, 40, 30]],
}


@pytest.mark.parametrize("sizes", [pytest.param(sizes, id=name) for name, sizes in GRIDS.items()])
@torch.no_grad()
def test_qwen_images(qwen_vl: Any, qwen_vl_graphs: Graphs, sizes: list[list[int]]) -> None:
    grids = torch.tensor(sizes)
    pixels = patches(grids)
    expected = side_by_side(qwen_vl.model.get_image_features(pixels, grids, return_dict=True))
    assert close(qwen_vl_graphs.features(pixels, grids), expected)


@pytest.mark.parametrize("sizes", [[[2, 6, 4]], [[3, 4, 4], [1, 4, 4]]])
@torch.no_grad()
def test_qwen_videos(qwen_vl: Any, qwen_vl_graphs: Graphs, sizes: list[list[int]]) -> None:
    """Frames of one size, in videos of unlike lengths; a frame sees no other one."""
    grids = torch.tensor(sizes)
    pixels = patches(grids)
    expected = side_by_side(qwen_vl.model.get_video_features(pixels, grids, return_dict=True))
    assert close(qwen_vl_graphs.features(pixels, grids), expected)


@pytest.mark.parametrize("sizes", [[[1, 4, 4], [1, 2, 8]], [[1, 2, 4], [1, 4, 2], [1, 2, 4]], [[1, 4, 4], [1, 4, 6]]])
def test_images_of_unlike_sizes_are_an_error(qwen_vl_graphs: Graphs, sizes: list[list[int]]) -> None:
    """In one call, and be it that all have as many patches."""
    grids = torch.tensor(sizes)
    with pytest.raises(Exception, match="shape"):
        qwen_vl_graphs.features(patches(grids), grids)


@pytest.mark.parametrize("images", [1, 3])
@torch.no_grad()
def test_gemma_images(gemma_vl: Any, gemma_vl_graphs: Graphs, images: int) -> None:
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = gemma_vl.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)
    found = gemma_vl_graphs.features(pixels)
    assert close(found[:, :-1], expected)
    assert (found[:, -1] == 1).all() and found.shape[1] == embedding_width(gemma_vl.config)


@torch.no_grad()
def test_a_wrong_layer_shows(qwen_vl: Any, gemma_vl: Any) -> None:
    """The tolerance above would not hide a block that is left out, or that mixes images up."""
    grids = torch.tensor([[1, 4, 6]])
    pixels, images = patches(grids), torch.randn(1, 3, 32, 32)
    for model, last, run in (
        (qwen_vl, qwen_vl.model.visual.blocks[-1].attn.proj, lambda: qwen_vl.model.visual(pixels, grids).pooler_output),
        (
            gemma_vl,
            gemma_vl.model.vision_tower.encoder.layers[-1].self_attn.out_proj,
            lambda: gemma_vl.model.get_image_features(images).pooler_output,
        ),
    ):
        before = run()
        hook = last.register_forward_hook(lambda _, given, out: out * 0)
        after = run()
        hook.remove()
        assert (before - after).abs().max() > 0.05 * before.abs().max(), model.config.model_type


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_fused_kernels(family: str, request: pytest.FixtureRequest) -> None:
    """One attention a layer, without a mask and without all of its scores at once; products are MatMul."""
    graph = request.getfixturevalue(f"{family}_vl_graphs").models["vision"].graph
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention"]
    assert len(attentions) == 3 and all(len(node.inputs) == 3 for node in attentions)
    assert not {"Softmax", "Gemm", "If", "Loop"} & {node.op_type for node in graph}


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_packages_may_have_these_graphs(family: str, request: pytest.FixtureRequest) -> None:
    """Those of a package are checked before ONNX Runtime sees them."""
    graphs = request.getfixturevalue(f"{family}_vl_graphs")
    size = (graphs.folder / "weights.data").stat().st_size
    manifest: Any = SimpleNamespace(files={"weights.data": {"size": size}}, weights="weights.data")
    for name in graphs.models:
        model = onnx.load(graphs.folder / f"{name}.onnx", load_external_data=False)
        _Checker(manifest).check(model.graph, {}, 0)  # raises where it finds a fault


@torch.no_grad()
def test_fp16(qwen_vl: Any, gemma_vl: Any, tmp_path: Path) -> None:
    """Half a thousandth is what a number is rounded by; after three blocks features are off by twice as much."""
    grids = torch.tensor([[1, 6, 8]] * 2)
    for name, model, pixels, given in (
        ("qwen", qwen_vl, patches(grids), grids),
        ("gemma", gemma_vl, torch.randn(2, 3, 32, 32), None),
    ):
        (tmp_path / name).mkdir()
        graphs = Graphs(model, tmp_path / name, torch.float16)
        if given is None:
            expected = model.model.get_image_features(pixels).pooler_output.flatten(0, 1)
            expected = torch.nn.functional.pad(expected, (0, 1), value=1.0)
        else:
            expected = side_by_side(model.model.get_image_features(pixels, given, return_dict=True))
        found = graphs.features(pixels, given)
        assert found.dtype == np.float16 and close(found.astype(np.float32), expected, 3e-3)


@pytest.mark.parametrize("family", ["qwen", "gemma"])
@torch.no_grad()
def test_flops(family: str, qwen_vl: Any, gemma_vl: Any) -> None:
    """Those that PyTorch counts while transformers' model runs, without fused attention, which it does not count."""
    images, patch = 2, 64
    grids = torch.tensor([[1, 8, 8]] * images)
    inputs = (patches(grids), grids) if family == "qwen" else (torch.randn(images, 3, 32, 32),)
    model = qwen_vl if family == "qwen" else gemma_vl
    with attention_implementation(model, "eager"), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(*inputs)
    sizes = {"num_image_tokens": images * patch // MERGE**2, "num_images": images, "total": patch}
    counted = flops_by_layer(trace_images(model).graphs["vision"], "vision", sizes)
    assert sum(counted.values()) == counter.get_total_flops()


@pytest.mark.parametrize(("family", "grid"), [("qwen", [[1, 32, 32]]), ("gemma", None)])
@torch.no_grad()
def test_flops_of_the_reference_image(family: str, grid: list[list[int]] | None, request: Any) -> None:
    """256 tokens, of four patches each, where images have any size; and else as many as they have."""
    model = request.getfixturevalue(f"{family}_vl")
    inputs = (torch.randn(1, 3, 32, 32),) if grid is None else (patches(torch.tensor(grid)), torch.tensor(grid))
    with attention_implementation(model, "eager"), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(*inputs)
    tokens = 16 if grid is None else REFERENCE_IMAGE_TOKENS
    assert image_flops(trace_images(model).graphs["vision"]) == (tokens, counter.get_total_flops())


def test_a_model_with_weights_gives_the_same_graphs(qwen_vl: Any) -> None:
    fake, real = trace_images(build_model(qwen_vl.config)), trace_images(qwen_vl)
    assert fake.constants.keys() == real.constants.keys()
    assert all(torch.equal(fake.constants[name], real.constants[name]) for name in fake.constants)
    for name in fake.graphs:
        assert print_graph(fake.graphs[name], name) == print_graph(real.graphs[name], name)


@torch.no_grad()
def test_tracing_leaves_the_model_as_it_was(gemma_vl: Any) -> None:
    before = gemma_vl.model.vision_tower.config._attn_implementation
    trace_images(gemma_vl)
    assert gemma_vl.model.vision_tower.config._attn_implementation == before


@pytest.mark.parametrize("grid", [[1, 0, 0], [1, 5, 7], [-1, -4, 6], [1, 24, 1], [1, 1, 24], [1, 2**40, 2**40]])
def test_a_bad_grid_does_not_end_the_process(qwen_vl_graphs: Graphs, grid: list[int]) -> None:
    """By a division by zero, or a place outside of the table of positions: callers check grids, and some forget it."""
    found = np.zeros(1)
    with contextlib.suppress(Fail, InvalidArgument, RuntimeException):
        found = qwen_vl_graphs.features(patches(torch.tensor([[1, 4, 6]])), torch.tensor([grid]))
    assert np.isfinite(found).all()


def test_other_models_are_refused() -> None:
    model = build_model(tiny_qwen3_vl())
    model.config.model_type = "llava"
    with pytest.raises(PopcompileError, match="llava: popcompile supports the vision towers of qwen3_vl, gemma3"):
        trace_images(model)


#: parameters of Qwen3-VL's tower, whose modules popcompile/vision/towers.py calls one by one
QWEN_PARTS = (
    r"patch_embed\.proj", r"pos_embed", r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.\w+)",
    r"(merger|deepstack_merger_list\.\d+)\.\w+",
)  # fmt: skip


def test_the_tower_has_the_known_parts(qwen_vl: Any) -> None:
    """Where this fails, transformers has changed Qwen3-VL's tower: compare its forward with Qwen3VLTower's."""
    names = {name.rpartition(".")[0] for name, _ in qwen_vl.model.visual.named_parameters()}
    unknown = {name for name in names if not re.fullmatch("|".join(QWEN_PARTS), name)}
    visual, attention = qwen_vl.model.visual, qwen_vl.model.visual.blocks[0].attn
    assert not unknown, f"transformers {transformers.__version__} has new parts in the tower"
    assert attention.scaling == attention.qkv.in_features**-0.5 * attention.num_heads**0.5
    assert visual.rotary_pos_emb.inv_freq.shape == (attention.qkv.in_features // attention.num_heads // 4,)


def test_session_types(qwen_vl_graphs: Graphs) -> None:
    inputs: dict[str, ort.NodeArg] = {value.name: value for value in qwen_vl_graphs.vision.get_inputs()}
    assert inputs["pixel_values"].shape == ["4*num_image_tokens", 96]
    assert inputs["image_grid_thw"].shape == ["num_images", 3]
    assert qwen_vl_graphs.vision.get_outputs()[0].shape == ["num_image_tokens", 192]
