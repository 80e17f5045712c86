"""Run the canonical graph layer by layer, over tokens at any positions and keys of any origin.

Calibration and the choice of layers ask what a layer does to hidden states that the whole model never made: those that
a pruned prefill hands on. A layer is its nodes of the graph; attention's mask and cache are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from popcompile.passes import ops
from popcompile.passes.graph import cache_of, call_nodes, dependencies, find, layer_of, mask_of, outputs_of, tokens_of
from popcompile.passes.layers import layer_input, layer_output, projected_kv

_Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Tokens:
    """Tokens to run together, and what layers read of them besides the hidden state.

    positions: [B, S]. values: what the graph computes before its first layer (embeddings, sizes).
    """

    positions: Tensor
    values: _Values


@dataclass(frozen=True)
class Keys:
    """What queries may attend to besides themselves: keys and values [B, G, T, D], rotated, at positions [B, T]."""

    key: Tensor
    value: Tensor
    positions: Tensor


class LayerwiseModel:
    """A canonical graph with real weights (execution.materialise), cut at its layers."""

    def __init__(self, model: fx.GraphModule) -> None:
        self._model = model
        self.num_layers = len(find(model, op=ops.attention))
        self._parameters: _Values = {
            n: attrgetter(str(n.target))(model) for n in model.graph.nodes if n.op == "get_attr"
        }
        layered = {n for n in call_nodes(model) if layer_of(n) is not None}
        after: set[fx.Node] = set()
        for node in call_nodes(model):
            if node not in layered and any(n in layered or n in after for n in node.all_input_nodes):
                after.add(node)
        self._before = [n for n in call_nodes(model) if n not in layered and n not in after]
        self._layers = [[n for n in call_nodes(model) if layer_of(n) == i] for i in range(self.num_layers)]
        logits = outputs_of(model)[0]
        needed = dependencies([logits], lambda n: n in after)
        self._head = [n for n in call_nodes(model) if n in needed]
        self._inputs = [layer_input(model, i) for i in range(self.num_layers)]
        self._output = layer_output(model, self.num_layers - 1)
        self._caches = [find(model, op=ops.append_kv, layer=i) for i in range(self.num_layers)]
        self._projected = [projected_kv(model, i) for i in range(self.num_layers)]

    @property
    def hidden_size(self) -> int:
        return int(self._inputs[0].meta["val"].shape[2])

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Key/value heads and head size."""
        shape = self._caches[0][0].meta["val"].shape
        return int(shape[1]), int(shape[3])

    def tokens(self, ids: Tensor, positions: Tensor) -> Tokens:
        """ids, positions: [B, S]."""
        heads, size = self.kv_shape
        values: _Values = dict.fromkeys(cache_of(self._model), torch.empty(len(ids), heads, 0, size))
        values[tokens_of(self._model)] = ids
        values[mask_of(self._model)] = torch.ones_like(ids)
        self._run(self._before, values, {ops.token_positions: lambda *_: positions})
        return Tokens(positions, values)

    def embed(self, tokens: Tokens) -> Tensor:
        """The hidden state before the first layer [B, S, hidden]."""
        return tokens.values[self._inputs[0]]

    def layer(self, index: int, x: Tensor, tokens: Tokens, visible: Tensor, keys: Keys | None = None) -> Tensor:
        """The layer's output [B, S, hidden] for its input x [B, S, hidden].

        visible: [B or 1, S, T + S], which of `keys` and of the tokens themselves a query may attend to; sliding
        windows narrow it.
        """

        def append(past: Any, new: Tensor, positions: Tensor) -> Tensor:
            if keys is None:
                return new
            pending.append(new)
            return torch.cat((keys.key if len(pending) == 1 else keys.value, new), dim=2)

        def attention(q: Tensor, k: Tensor, v: Tensor, _: Tensor, scale: float, window: int, *rest: Any) -> Tensor:
            seen = visible
            if window > 0:
                slots = tokens.positions if keys is None else torch.cat((keys.positions, tokens.positions), dim=1)
                seen = seen & (slots[:, None, :] > tokens.positions[:, :, None] - window)
            return ops.attend(q, k, v, seen[:, None], scale, *rest)

        pending: list[Tensor] = []
        values = {**tokens.values, self._inputs[index]: x}
        self._run(self._layers[index], values, {ops.append_kv: append, ops.attention: attention})
        return values[layer_output(self._model, index)]

    def project(self, index: int, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The layer's projected keys and values [B, S, kv_heads x head size] for its input x [B, S, hidden]."""
        targets = self._projected[index]
        values = {**tokens.values, self._inputs[index]: x}
        self._run(self._needed(index, targets, ()), values)
        return values[targets[0]], values[targets[1]]

    def cache_entries(self, index: int, key: Tensor, value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Cache entries of projected keys and values, after norms and RoPE, [B, G, S, D] each."""
        projected = self._projected[index]
        targets = [n for cache in self._caches[index] if isinstance(n := cache.args[1], fx.Node)]
        values = {**tokens.values, projected[0]: key, projected[1]: value}
        self._run(self._needed(index, targets, projected), values)
        return values[targets[0]], values[targets[1]]

    def _needed(self, index: int, targets: Sequence[fx.Node], given: Sequence[fx.Node]) -> list[fx.Node]:
        needed = dependencies(targets, lambda n: layer_of(n) == index and n not in given)
        return [n for n in self._layers[index] if n in needed]

    def logits(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Logits [B, S, vocabulary] of the last layer's output x [B, S, hidden]."""
        values = {**tokens.values, self._output: x}
        self._run(self._head, values)
        return values[outputs_of(self._model)[0]]

    def _run(
        self, nodes: Sequence[fx.Node], values: _Values, instead: Mapping[Any, Callable[..., Any]] = ops.REFERENCE
    ) -> None:
        functions = {**ops.REFERENCE, **instead}

        def value(node: fx.Node) -> Any:
            return self._parameters[node] if node.op == "get_attr" else values[node]

        for node in nodes:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            function: Any = functions.get(node.target, node.target)
            values[node] = function(*args, **kwargs)
