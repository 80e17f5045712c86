"""Embedding graphs in ONNX Runtime give the embeddings that transformers' models hand to their decoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from vision import (
    END,
    IMAGE,
    MERGE,
    START,
    VIDEO,
    Graphs,
    close,
    patches,
    random_model,
    tiny_gemma3_vision,
    tiny_qwen3_vl,
)

from popcompile.passes.graph import find, value_of
from popcompile.passes.lower_linear import LowerLinear
from popcompile.passes.onnx_ops import onnx_op_type
from popcompile.vision.tracing import build_model, trace_images

#: rows of a batch: numbers are text, pairs are images' sizes in patches, triples videos'
Row = list[int | tuple[int, ...]]

ROWS: dict[str, list[Row]] = {
    "text": [[1, 2, 3]],
    "one image": [[5, (4, 6), 7, 8]],
    "image first": [[(4, 4), 7]],
    "image last": [[7, 9, (2, 2)]],
    "images of unlike sizes": [[5, (4, 6), 7, (8, 4), 9, 10]],
    "images beside each other": [[(4, 4), (4, 4)]],
    "a video before an image": [[3, (2, 4, 6), 4, (4, 4), 5]],
    "rows with unlike images": [[5, (4, 6), 7], [(2, 2), 8, (4, 4), 2], [1, 2, 3, 4, 5, 6, 7]],
}


def tokens_of(row: Row) -> list[int]:
    ids: list[int] = []
    for part in row:
        if isinstance(part, int):
            ids.append(part)
        elif len(part) == 2:
            ids += [START, *[IMAGE] * (part[0] * part[1] // MERGE**2), END]
        else:
            ids += [START, *[VIDEO] * (part[0] * part[1] * part[2] // MERGE**2), END]
    return ids


def batch(rows: list[Row]) -> Tensor:
    """input_ids, padded on the right."""
    ids = [torch.tensor(tokens_of(row)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def grids_of(rows: list[Row]) -> list[list[int]]:
    return [[1, *part][-3:] for row in rows for part in row if not isinstance(part, int)]


@torch.no_grad()
def given_to_decoder(model: Any, **inputs: Any) -> dict[str, Any]:
    """What transformers' model calls its language model with."""
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, named: seen.update(named), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen


def wide(seen: dict[str, Any]) -> Tensor:
    """inputs_embeds, and DeepStack features behind them where images are, zeros elsewhere: [B, S, (1 + D) * H]."""
    embeds = seen["inputs_embeds"]
    if (places := seen.get("visual_pos_masks")) is None:
        return torch.nn.functional.pad(embeds, (0, 2 * embeds.shape[-1]))
    deep = [torch.zeros_like(embeds).masked_scatter(places[..., None], f) for f in seen["deepstack_visual_embeds"]]
    return torch.cat([embeds, *deep], dim=-1)


@pytest.mark.parametrize("rows", [pytest.param(rows, id=name) for name, rows in ROWS.items()])
def test_qwen(qwen_vl: Any, qwen_vl_graphs: Graphs, rows: list[Row]) -> None:
    ids, every = batch(rows), grids_of(rows)
    pixels = [patches(torch.tensor([grid]), seed) for seed, grid in enumerate(every)]
    inputs: dict[str, Any] = {"input_ids": ids}
    for kind, is_video in (("image", False), ("video", True)):
        mine = [i for i, grid in enumerate(every) if (grid[0] > 1) == is_video]
        if mine:
            values = "pixel_values_videos" if is_video else "pixel_values"
            inputs[values] = torch.cat([pixels[i] for i in mine])
            inputs[f"{kind}_grid_thw"] = torch.tensor([every[i] for i in mine])
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)  # of no concern here
    expected = wide(given_to_decoder(qwen_vl, position_ids=positions, **inputs))
    features = [qwen_vl_graphs.features(p, torch.tensor([grid])) for p, grid in zip(pixels, every, strict=True)]
    empty = np.zeros((0, expected.shape[2]), np.float32)
    assert close(qwen_vl_graphs.embeddings(ids, np.concatenate([empty, *features])), expected)


@pytest.mark.parametrize("token", [100, 93])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_gemma(token: int, images: int, tmp_path: Any) -> None:
    """Embeddings are scaled, images are not; the image token is in the vocabulary, or beyond it."""
    model = random_model(tiny_gemma3_vision(token))
    graphs = Graphs(model, tmp_path)
    rows = [[2, 5, *[94, *[token] * 16, 95, 7] * count] for count in ([images - 1, 1] if images > 1 else [images])]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = given_to_decoder(model, input_ids=ids, **({"pixel_values": pixels} if images else {}))
    features = graphs.features(pixels) if images else np.zeros((0, 65), np.float32)
    found = graphs.embeddings(ids, features)
    assert close(found[..., :-1], seen["inputs_embeds"])
    assert (found[..., -1] == (ids == token).numpy()).all()


def test_image_tokens_without_features_are_text(qwen_vl: Any, qwen_vl_graphs: Graphs) -> None:
    """As in transformers' model, which may write such a token itself."""
    ids = torch.tensor([[3, IMAGE, VIDEO]])
    table = qwen_vl.get_input_embeddings().weight
    found = qwen_vl_graphs.embeddings(ids, np.zeros((0, 192), np.float32))
    assert close(found, torch.nn.functional.pad(table[ids], (0, 128)).detach())


@pytest.mark.parametrize(("family", "width"), [("qwen", 192), ("gemma", 65)])
def test_text_alone(family: str, width: int, request: pytest.FixtureRequest) -> None:
    """By the graph that takes no features, also of tokens beyond the vocabulary."""
    graphs: Graphs = request.getfixturevalue(f"{family}_vl_graphs")
    ids = torch.tensor([[3, 7], [IMAGE, 100 if family == "gemma" else VIDEO]])
    assert [value.name for value in graphs.text_embedding.get_inputs()] == ["input_ids"]
    (found,) = graphs.text_embedding.run(["inputs_embeds"], {"input_ids": ids.numpy()})
    assert np.array_equal(found, graphs.embeddings(ids, np.zeros((0, width), np.float32)))


@pytest.mark.parametrize("given", [1, 3, 5])
def test_another_number_of_features_is_an_error(qwen_vl_graphs: Graphs, given: int) -> None:
    ids = torch.tensor([[3, *[IMAGE] * 4]])
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        qwen_vl_graphs.embeddings(ids, np.zeros((given, 192), np.float32))


def test_a_table_tied_to_the_head_is_stored_once() -> None:
    """The head's matrix is the embedding table as it is, though another graph of the program reads it."""
    program = trace_images(build_model(tiny_qwen3_vl()))
    gather = find(program.graphs["embedding"], op=torch.ops.aten.embedding.default)[0]
    table = gather.args[0]
    assert isinstance(table, fx.Node)
    graph = fx.Graph()
    x, head = graph.placeholder("x"), graph.get_attr(str(table.target))
    head.meta["val"] = value_of(table)
    with value_of(table).fake_mode:
        x.meta["val"] = torch.zeros(2, 64)
    logits = graph.call_function(torch.ops.aten.linear.default, (x, head))
    with value_of(table).fake_mode:
        logits.meta["val"] = torch.zeros(2, 96)
    graph.output((logits,))
    program.graphs["decode"] = fx.GraphModule(program.graphs["embedding"], graph)
    lowering = LowerLinear()
    lowering.program = program
    lowering(program.graphs["decode"])
    products = [node for node in program.graphs["decode"].graph.nodes if onnx_op_type(node)]
    assert [onnx_op_type(node) for node in products] == ["FusedMatMul"]
