"""Widen heads to a size that the attention kernels take.

ONNX Runtime's GroupQueryAttention refuses head sizes that 8 does not divide (OpenLLaMA-3B has 100). Features of zero
change no score, and a value's make features of the output that nobody reads:

    attention(q, append_kv(past_k, k), append_kv(past_v, v))
        => attention(pad(q), append_kv(past_k, pad(k)), append_kv(past_v, pad(v)))[..., :head size]

The cache has the wider heads, in the graph's inputs and outputs as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit, fake_mode_of, find, inputs_of, set_value, shape_of, value_of

aten = torch.ops.aten

_CACHES = (ops.append_kv, ops.write_kv)


@dataclass(frozen=True)
class AttentionKernels:
    """What an execution provider's kernels of GroupQueryAttention need.

    head_multiple: what divides the head size. max_head_size: the largest that there is a kernel for; None: any.
    """

    head_multiple: int = 8
    max_head_size: int | None = None

    def padded(self, head_size: int) -> int:
        """The head size that a model's heads are widened to."""
        return -(-head_size // self.head_multiple) * self.head_multiple


class PadHeads(Pass):
    stages = ("prefill", "decode")

    def __init__(self, kernels: AttentionKernels | None = None) -> None:
        super().__init__()
        self.kernels = kernels or AttentionKernels()

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        widest = max((shape_of(n)[3] for n in self._caches(graph_module)), default=0)
        limit = self.kernels.max_head_size
        self.check(limit is None or widest <= limit, f"heads of {widest} features, the kernels take at most {limit}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for name, node in inputs_of(graph_module).items():
            if name.startswith("past_key_values"):
                _widen_input(node, self.kernels.padded(shape_of(node)[3]))
        for node in self._caches(graph_module):
            new = node.args[1]
            assert isinstance(new, fx.Node)
            node.update_arg(1, self._pad(graph_module.graph, new, node))
            set_value(node)
        for node in find(graph_module, op=ops.attention):
            query = node.args[0]
            assert isinstance(query, fx.Node)
            size = shape_of(query)[3]
            padded = self._pad(graph_module.graph, query, node)
            if padded is not query:
                node.update_arg(0, padded)
                set_value(node)
                _narrow(graph_module.graph, node, size)
                self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        wrong = {shape_of(n)[3] for n in self._caches(graph_module)} - {
            self.kernels.padded(shape_of(n)[3]) for n in self._caches(graph_module)
        }
        self.check(not wrong, f"heads of {sorted(wrong)} features are left")

    @staticmethod
    def _caches(gm: fx.GraphModule) -> list[fx.Node]:
        return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _CACHES]

    def _pad(self, graph: fx.Graph, node: fx.Node, user: fx.Node) -> fx.Node:
        """node [B, heads, S, D] with features of zero behind its own, where it has too few."""
        size = shape_of(node)[3]
        padded = self.kernels.padded(size)
        if padded == size:
            return node
        with graph.inserting_before(user):
            return emit(graph, ops.pad_heads, node, padded, like=node)


def _widen_input(node: fx.Node, size: int) -> None:
    value = value_of(node)
    with fake_mode_of(node.graph):
        node.meta["val"] = value.new_empty((*value.shape[:3], size))


def _narrow(graph: fx.Graph, attention: fx.Node, size: int) -> None:
    """Let users of attention's output read its first `size` features; behind the transposes that modules begin with."""
    for user in list(attention.users):
        source: Any = attention
        if user.target == aten.transpose.int and set(user.args[1:]) == {1, 2}:
            source = user
            set_value(user)
        readers = list(source.users) if source is user else [user]
        with graph.inserting_after(source):
            narrow = emit(graph, aten.slice.Tensor, source, 3, 0, size, like=source)
        for reader in readers:
            reader.replace_input_with(source, narrow)
