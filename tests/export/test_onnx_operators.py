"""Every rule of export/operators.py computes in ONNX Runtime what PyTorch does, and so does an operator without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from popcompile.export.onnx_graph import write_graph
from popcompile.export.operators import RULES
from popcompile.passes import ops
from popcompile.passes.graph import outputs_of

WINDOW, FEATURES = 4, 6
#: a batch's new tokens and past, and how many of them each row has
SIZES = [(1, 1, 0, [1]), (1, 7, 0, [7]), (3, 7, 0, [7, 2, 5]), (2, 3, 4, [7, 7]), (3, 1, 6, [7, 3, 1])]

Function = Callable[[Tensor, Tensor, Tensor], Any]


def positions(ids: Tensor, mask: Tensor) -> Tensor:
    return ops.token_positions(mask, ids)


def boundary(ids: Tensor, mask: Tensor) -> Tensor:
    return ops.boundary_index(mask, ids)


def start(ids: Tensor, mask: Tensor) -> Tensor:
    return ops.tail_start(mask, ids, WINDOW)


def insert_tail(ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    tail = ops.select_tail(x, start(ids, mask), WINDOW)
    return ops.insert_tail(x, tail * 3, start(ids, mask))


def axes_first(ids: Tensor) -> Tensor:
    """Two positions for each token [2, B, S]."""
    return torch.cat((ids[None], ids[None] + 100))


def packed_attention(ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Rows of a batch, one behind the other."""
    query, key, value = (x.view(-1, 2, FEATURES // 2) * factor for factor in (1, 2, 3))
    return ops.packed_attention(query, key, value, torch.full((), x.shape[1], dtype=torch.int64), 0.7)


#: tokens [B, S] int64, mask [B, T], x [B, S, FEATURES] -> a tensor, or several
OURS: dict[str, Function] = {
    "token_positions": lambda ids, mask, x: positions(ids, mask),
    "last_position": lambda ids, mask, x: ops.last_position(mask, ids),
    "boundary_position": lambda ids, mask, x: ops.boundary_position(mask),
    "boundary_index": lambda ids, mask, x: boundary(ids, mask),
    "tail_start": lambda ids, mask, x: start(ids, mask),
    "tail_end": lambda ids, mask, x: ops.tail_end(mask, ids, WINDOW),
    "select_boundary": lambda ids, mask, x: ops.select_boundary(x, boundary(ids, mask)),
    "select_boundary of positions": lambda ids, mask, x: ops.select_boundary(positions(ids, mask), boundary(ids, mask)),
    "insert_boundary": lambda ids, mask, x: ops.insert_boundary(x, x[:, :1] * 2, boundary(ids, mask)),
    "select_tail": lambda ids, mask, x: ops.select_tail(x, start(ids, mask), WINDOW),
    "select_tail of positions": lambda ids, mask, x: ops.select_tail(positions(ids, mask), start(ids, mask), WINDOW),
    "insert_tail": insert_tail,
    "rope_positions": lambda ids, mask, x: ops.rope_positions(axes_first(ids)),
    "rotary_rows": lambda ids, mask, x: ops.rotary_rows(ops.rope_positions(axes_first(ids)), [1, 0, 1, 1, 0]),
    "token_rows": lambda ids, mask, x: ops.token_rows(x),
    "replace_sink": lambda ids, mask, x: ops.replace_sink(x, x[0, 0] * 5, positions(ids, mask)),
    "rotate_tokens": lambda ids, mask, x: ops.rotate_tokens(
        torch.cat((x, x * 2 + 1), -1).view(-1, 2, FEATURES), x.view(-1, FEATURES)[:, :3], x.view(-1, FEATURES)[:, 3:]
    ),
    "packed_attention": packed_attention,
    "image_ends": lambda ids, mask, x: ops.image_ends(ids > 3, positions(ids, mask), mask),
    "image_ends of none": lambda ids, mask, x: ops.image_ends(ids > 9, positions(ids, mask), mask),
    "scatter_features": lambda ids, mask, x: ops.scatter_features(x, torch.ones_like(ids) > 0, x.view(-1, FEATURES)),
    "scatter_features of none": lambda ids, mask, x: ops.scatter_features(x, ids > 0, x.view(-1, FEATURES)[:0]),
}
PYTORCHS: dict[str, Function] = {
    "with a number": lambda ids, mask, x: (x + 1.5) * 2 / 3 - 0.5,
    "with each other": lambda ids, mask, x: x * x + x / (x.abs() + 1) - x,
    "of two types": lambda ids, mask, x: x * x.half() + ids[:, :, None],
    "with a size": lambda ids, mask, x: x * x.shape[1],
    "unary": lambda ids, mask, x: x.sin() + x.cos() + x.sigmoid() + x.tanh() + (x.abs() + 1).log(),
    "silu": lambda ids, mask, x: F.silu(x),
    "gelu": lambda ids, mask, x: F.gelu(x),
    "gelu by tanh": lambda ids, mask, x: F.gelu(x, approximate="tanh"),
    "pow": lambda ids, mask, x: x**3.0,
    "to": lambda ids, mask, x: (x.half(), x.to(torch.int64), ids.to(torch.float32), mask.to(torch.bool)),
    "where": lambda ids, mask, x: torch.where(~(x > 0.5), x, x * 2),
    "masked_fill": lambda ids, mask, x: x.masked_fill(x > 0, -1.0),
    "matmul": lambda ids, mask, x: x @ x.transpose(1, 2),
    "addmm": lambda ids, mask, x: torch.addmm(x[0, 0], x[0], x[0, :1].repeat(FEATURES, 1)),
    "layer_norm": lambda ids, mask, x: F.layer_norm(x, (FEATURES,), x[0, 0], x[0, 0] + 1, 1e-3),
    "sum": lambda ids, mask, x: (x.sum((-1,), keepdim=True), x.sum(1), mask.sum(1)),
    "max": lambda ids, mask, x: (x.amax((-1,), keepdim=True), x.max()),
    "softmax": lambda ids, mask, x: (x.softmax(-1), x.half().softmax(-1, dtype=torch.float32)),
    "topk": lambda ids, mask, x: torch.topk(x, 3, -1),
    "view": lambda ids, mask, x: x.view(x.shape[0], x.shape[1], 2, FEATURES // 2),
    "view that joins": lambda ids, mask, x: x.reshape(-1, FEATURES),
    "view that moves sizes": lambda ids, mask, x: x.view(1, x.shape[0], x.shape[1], FEATURES),
    "flatten": lambda ids, mask, x: x.view(x.shape[0], x.shape[1], 2, FEATURES // 2).flatten(2, 3),
    "transpose": lambda ids, mask, x: x.transpose(-1, 1),
    "unsqueeze": lambda ids, mask, x: (x.unsqueeze(-1), x.unsqueeze(1)),
    "expand": lambda ids, mask, x: (x[:, None].expand(-1, 2, -1, -1), x[0, 0].expand(x.shape[0], x.shape[1], FEATURES)),
    "slice": lambda ids, mask, x: (x[:, :, 1:4], x[:, :, 2:], x[:, :, ::2], mask[:, : ids.shape[1]]),
    "cat": lambda ids, mask, x: torch.cat((x, x * 2), -1),
    "chunk": lambda ids, mask, x: x.chunk(2, -1),
    "split": lambda ids, mask, x: (*x.split([1, 2, 3], -1), *x.split(4, -1)),
    "full": lambda ids, mask, x: (
        torch.full((2, FEATURES), 0.5),
        torch.full((), ids.shape[1]),
        torch.full((x.shape[0], 2), 3, dtype=torch.int32),
    ),
    "sizes of sizes": lambda ids, mask, x: (
        torch.full((x.shape[1] * 2 + 1, 2), 0.5),
        torch.full((mask.shape[1] * 3 - 1,), x.shape[1] // 2),
    ),
    "full_like": lambda ids, mask, x: (torch.full_like(x, 2.0), torch.zeros_like(x)),
    "embedding": lambda ids, mask, x: F.embedding(ids.clamp(max=0), x[0]),
    "logical_or": lambda ids, mask, x: torch.logical_or(x > 0.5, x > 0.1),
    "floor and neg": lambda ids, mask, x: (-x).floor(),
    "clamp": lambda ids, mask, x: (x.clamp(min=0.1), x.clamp(-0.5, 0.5), x.clamp(max=0), ids.clamp(2, 4)),
    "whole quotients": lambda ids, mask, x: (ids // 3, ids % 3, ids % (ids + 1), ids // (ids + 1)),
    "equal": lambda ids, mask, x: ids == 3,
    "from a number": lambda ids, mask, x: (1 - x, 3 - ids),
    "select": lambda ids, mask, x: (x[0], x.select(-1, 2), x.select(2, -1)),
    "arange": lambda ids, mask, x: (torch.arange(x.shape[1]), torch.arange(5)),
    "pad": lambda ids, mask, x: (F.pad(x, (1, 2), value=3.0), F.pad(x, (0, 1, 2, 0)), F.pad(ids, (0, 2))),
    "conv2d": lambda ids, mask, x: F.conv2d(
        x[:, :1, None].expand(-1, -1, 4, -1), torch.full((3, 1, 2, 3), 0.5), torch.full((3,), 2.0), (2, 3), "valid"
    ),
    "avg_pool2d": lambda ids, mask, x: (
        F.avg_pool2d(x[:, :1, None].expand(-1, -1, 4, -1), 2),
        F.avg_pool2d(x[:, :1, None].expand(-1, -1, 4, -1), (2, 3), (1, 2)),
    ),
    "gather": lambda ids, mask, x: torch.gather(x, 2, (x > 0).to(torch.int64)),
    "scatter": lambda ids, mask, x: torch.scatter(x, 2, torch.topk(x, 2, -1)[1], torch.topk(x, 2, -1)[0] * 3),
    "scatter a number": lambda ids, mask, x: torch.scatter(x, 2, torch.topk(x, 2, -1)[1], 7.0),
}
#: operators without a rule, and calls that a rule leaves
FOREIGN: dict[str, Function] = {
    "cumsum": lambda ids, mask, x: x.cumsum(1) + x.flip(1).cumsum(1),
    "with a step": lambda ids, mask, x: torch.arange(0, 2 * x.shape[1], 2),
    "quotients of floats": lambda ids, mask, x: (x // 0.3, x % 0.3),
    "pad by reflection": lambda ids, mask, x: F.pad(x, (1, 2), mode="reflect"),
    "two results": lambda ids, mask, x: x.sort(-1),
    "layer_norm without weights": lambda ids, mask, x: F.layer_norm(x, (FEATURES,)),
    "with alpha": lambda ids, mask, x: torch.add(x, x, alpha=3) + torch.addmm(x[0], x[0], x[0].T @ x[0], beta=2),
    "twice": lambda ids, mask, x: x.cumsum(1) * (x + 1).cumsum(1),
}


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, input_ids: Tensor, attention_mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        made = self.function(input_ids, attention_mask, x)
        return tuple(made) if isinstance(made, tuple | list) else (made,)


def made_inputs(batch: int, new: int, past: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(batch * new + past)
    mask = (torch.arange(past + new)[None] < torch.tensor(lengths)[:, None]).long()
    x = torch.randn(batch, new, FEATURES, generator=random)
    return torch.randint(9, (batch, new), generator=random), mask, x


def traced(function: Function) -> fx.GraphModule:
    batch, new, total = (torch.export.Dim(name, max=64) for name in ("batch", "new", "total"))
    shapes = ({0: batch, 1: new}, {0: batch, 1: total}, {0: batch, 1: new})
    exported = torch.export.export(Module(function), made_inputs(2, 5, 3, [8, 8]), dynamic_shapes=shapes, strict=False)
    gm = exported.graph_module
    for node in [n for n in gm.graph.nodes if n.target == torch.ops.aten._assert_tensor_metadata.default]:
        gm.graph.erase_node(node)  # as Normalize does
    return gm


def session_of(function: Function) -> tuple[ort.InferenceSession, ir.Graph]:
    gm = traced(function)
    graph = write_graph(
        gm, "test", ["input_ids", "attention_mask", "x"], [f"out{i}" for i in range(len(outputs_of(gm)))]
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), graph


@pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in (OURS | PYTORCHS | FOREIGN).items()])
def test_operators(function: Function) -> None:
    session, graph = session_of(function)
    assert all(value.type is not None for node in graph for value in node.outputs if value.name)
    for sizes in SIZES:
        inputs = made_inputs(*sizes)
        named = dict(zip(("input_ids", "attention_mask", "x"), (tensor.numpy() for tensor in inputs), strict=True))
        read = {value.name for value in session.get_inputs()}
        found = session.run(None, {name: array for name, array in named.items() if name in read})
        for expected, got in zip(Module(function)(*inputs), found, strict=True):
            assert got.shape == tuple(expected.shape) and got.dtype == expected.numpy().dtype
            np.testing.assert_allclose(got, expected.numpy(), rtol=2e-3 if got.dtype == np.float16 else 1e-5, atol=1e-5)


def test_every_rule_is_tried() -> None:
    """But for those of ONNX's own operators, which passes put there and test."""
    tried = {node.target for function in (OURS | PYTORCHS).values() for node in traced(function).graph.nodes}
    missing = {str(target) for target in RULES if target not in tried} - {
        "aten.reshape.default",  # a view, once traced
    }
    assert not {name for name in missing if not name.startswith("<function symbolic")}


def test_packages(tiny_package: Path) -> None:
    """What is a shape there is a constant, or joined from sizes without arithmetic."""
    graphs = [
        onnx.load(tiny_package / f"{stage}.onnx", load_external_data=False).graph for stage in ("prefill", "decode")
    ]
    for graph in graphs:
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    nodes = {(id(graph), output): node for graph in graphs for node in graph.node for output in node.output}
    shapes = [nodes.get((id(g), node.input[1])) for g in graphs for node in g.node if node.op_type == "Reshape"]
    assert {node.op_type for node in shapes if node} <= {"Concat"}
    assert "CastLike" not in {node.op_type for node in nodes.values()}
