"""Run the canonical graph layer by layer, over tokens at any positions and keys of any origin.

Calibration and the choice of layers ask what a layer does to hidden states that the whole model never made: those that
a pruned prefill hands on. A layer is its nodes of the graph; attention's mask and cache are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from popcompile.passes import ops
from popcompile.passes.balance_activations import balanceable
from popcompile.passes.graph import (
    cache_of,
    call_nodes,
    dependencies,
    find,
    layer_of,
    mask_of,
    outputs_of,
    position_ids_of,
    runs,
    tokens_of,
)
from popcompile.passes.layers import layer_input, layer_output, projected_kv
from popcompile.pruning.execution import run_again
from popcompile.pruning.rows import TOKEN_IDS, DecoderInputs, Rows
from popcompile.pruning.weights import HeldWeights, Weights

aten = torch.ops.aten

_Values = dict[fx.Node, Any]

#: queries that attend at a time
_QUERIES = 192


@dataclass(frozen=True)
class Tokens:
    """Tokens to run together, and what layers read of them besides the hidden state.

    positions: [B, S]. values: what the graph computes before its first layer (embeddings, sizes). ends: the last
    position that each may see [B, S], where that is not its own: in a model whose images' tokens see all of them.
    """

    positions: Tensor
    values: _Values
    ends: Tensor | None = None

    def among_themselves(self) -> Tensor:
        """Which of them each may attend to where they are all of a row, one after the other: [B or 1, S, S]."""
        last = self.positions[:1] if self.ends is None else self.ends
        slots = self.positions[: len(last)]
        return slots[:, None, :] <= last[:, :, None]


@dataclass(frozen=True)
class Keys:
    """What queries may attend to besides themselves: keys and values [B, G, T, D], rotated, at positions [B, T]."""

    key: Tensor
    value: Tensor
    positions: Tensor


class LayerwiseModel:
    """A canonical graph cut at its layers. It is differentiable in hidden states and keys."""

    def __init__(
        self, model: fx.GraphModule, inputs: DecoderInputs = TOKEN_IDS, weights: Weights | None = None
    ) -> None:
        """model: computing in fp32. inputs: what the graph is given of tokens. weights: by default the graph's own,
        which are real (execution.materialise).
        """
        self._model, self._inputs_of, self._weights = model, inputs, weights or HeldWeights(model)
        self._sees_whole_images = bool(find(model, op=ops.image_ends))
        self.num_layers = len(find(model, op=ops.attention))
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
        self._outputs = [layer_output(model, i) for i in range(self.num_layers)]
        between = [dependencies([n], lambda n: n in after) for n in self._inputs[1:]]
        #: what is added to the residual stream behind a layer, before the next one reads it
        self._between = [[n for n in call_nodes(model) if n in nodes] for nodes in between]
        self._caches = [find(model, op=ops.append_kv, layer=i) for i in range(self.num_layers)]
        self._projected = [projected_kv(model, i) for i in range(self.num_layers)]
        self._balanceable = balanceable(model)

    @property
    def device(self) -> torch.device:
        """Where it computes: hidden states and keys that it is given are there, rows and slots on the CPU."""
        return self._weights.device

    @property
    def hidden_size(self) -> int:
        return int(self._inputs[0].meta["val"].shape[2])

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Key/value heads and head size."""
        shape = self._caches[0][0].meta["val"].shape
        return int(shape[1]), int(shape[3])

    def runs(self, layers: Iterable[int]) -> list[tuple[int, int]]:
        """Maximal runs (first, last) of these layers with nothing added between them."""
        return list(runs(layers, lambda layer: not self.adds_behind(layer)))

    def adds_behind(self, layer: int) -> bool:
        """Whether the next layer reads something else than what this one hands on."""
        return layer + 1 < self.num_layers and bool(self._between[layer])

    def tokens(self, rows: Rows, slots: Tensor) -> Tokens:
        """The tokens at slots [B, Q] of each row, to be run at the positions of these."""
        (heads, size), device = self.kv_shape, self.device
        values: _Values = dict.fromkeys(cache_of(self._model), torch.empty(len(rows), heads, 0, size, device=device))
        given = [n for n in (tokens_of(self._model), position_ids_of(self._model)) if n is not None]
        values |= zip(given, (each.to(device) for each in self._inputs_of.of(rows, slots)), strict=True)
        values[mask_of(self._model)] = torch.ones(len(rows), int(slots.max()) + 1, dtype=torch.int64, device=device)
        positions = slots.to(device)
        self._run(self._before, values, {ops.token_positions: lambda *_: positions})
        ends = rows.image_ends if self._sees_whole_images else None
        return Tokens(positions, values, None if ends is None else ends.gather(1, slots).to(device))

    def blank(self, count: int) -> Tokens:
        """So many tokens at position 0, of no text: for layers' own projections of any hidden state."""
        zeros = torch.zeros(1, count, dtype=torch.int64)
        return self.tokens(Rows(zeros), zeros)

    def embed(self, tokens: Tokens) -> Tensor:
        """The hidden state before the first layer [B, S, hidden]."""
        return tokens.values[self._inputs[0]]

    def layer(self, index: int, x: Tensor, tokens: Tokens, visible: Tensor, keys: Keys | None = None) -> Tensor:
        """What the next layer reads [B, S, hidden], or the head, for this one's input x [B, S, hidden].

        visible: [B or 1, S, T + S], which of `keys` and of the tokens themselves a query may attend to; sliding
        windows narrow it.
        """
        return self._again_for_gradients(self._layer, index, x, tokens, visible, keys)

    def _layer(self, index: int, x: Tensor, tokens: Tokens, visible: Tensor, keys: Keys | None) -> Tensor:
        values = self._layer_values(index, x, tokens, visible, keys)
        return self.hand_on(index, values[self._outputs[index]], tokens)

    def layer_and_inputs(
        self, index: int, x: Tensor, tokens: Tokens, visible: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`layer`'s result, and inside it the features [B, S, F] that BalanceActivations scales, by their constant."""
        values = self._layer_values(index, x, tokens, visible, None)
        features = {each.constant: values[each.features] for each in self._balanceable if each.features in values}
        return self.hand_on(index, values[self._outputs[index]], tokens), features

    def _layer_values(self, index: int, x: Tensor, tokens: Tokens, visible: Tensor, keys: Keys | None) -> _Values:
        def append(past: Any, new: Tensor, positions: Tensor) -> Tensor:
            if keys is None:
                return new
            pending.append(new)
            return torch.cat((keys.key if len(pending) == 1 else keys.value, new), dim=2)

        def attention(
            q: Tensor, k: Tensor, v: Tensor, _: Tensor, scale: float, window: int, *rest: Any, ends: Any = None
        ) -> Tensor:
            seen = visible
            if window > 0:
                slots = tokens.positions if keys is None else torch.cat((keys.positions, tokens.positions), dim=1)
                seen = seen & (slots[:, None, :] > tokens.positions[:, :, None] - window)
            return _attend(q, k, v, seen, scale, *rest)

        pending: list[Tensor] = []
        values = {**tokens.values, self._inputs[index]: x}
        self._run(self._layers[index], values, {ops.append_kv: append, ops.attention: attention})
        return values

    def hand_on(self, index: int, x: Tensor, tokens: Tokens) -> Tensor:
        """What the next layer reads of the layer's output x, both [B, S, hidden]: DeepStack's features are added."""
        if not self.adds_behind(index):
            return x
        values = {**tokens.values, self._outputs[index]: x}
        self._run(self._between[index], values)
        return values[self._inputs[index + 1]]

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
        return self._again_for_gradients(self._logits, x, tokens)

    def _logits(self, x: Tensor, tokens: Tokens) -> Tensor:
        values = {**tokens.values, self._outputs[-1]: x}
        self._run(self._head, values)
        return values[outputs_of(self._model)[0]]

    def _again_for_gradients(self, run: Callable[..., Tensor], *args: Any) -> Tensor:
        """What it returns. Where weights are streamed, gradients run it again, and do not hold on to its weights."""
        if self._weights.streamed and torch.is_grad_enabled():
            return run_again(run, *args)
        return run(*args)

    def _run(
        self, nodes: Sequence[fx.Node], values: _Values, instead: Mapping[Any, Callable[..., Any]] = ops.REFERENCE
    ) -> None:
        functions = {**ops.REFERENCE, **instead}

        def value(node: fx.Node) -> Any:
            return self._weights[str(node.target)] if node.op == "get_attr" else values[node]

        for node in nodes:
            if node.target == aten.embedding.default and (table := node.all_input_nodes[0]).op == "get_attr":
                values[node] = self._weights.embeddings(str(table.target), value(node.all_input_nodes[1]))
                continue
            args, kwargs = map_arg((node.args, node.kwargs), value)
            function: Any = functions.get(node.target, node.target)
            values[node] = function(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *others: Any) -> Tensor:
    """ops.attend, visible: [B or 1, S, T], in blocks of queries: keys before and behind all that a block may attend to
    are not computed with, which is nearly half of a long text's.
    """
    if query.shape[2] <= _QUERIES:
        return ops.attend(query, key, value, visible[:, None], *others)
    outputs = []
    for queries, seen in zip(query.split(_QUERIES, 2), visible.split(_QUERIES, 1), strict=True):
        slots = seen.flatten(0, 1).any(0).nonzero()
        keys = slice(int(slots[0]), int(slots[-1]) + 1)
        outputs.append(ops.attend(queries, key[:, :, keys], value[:, :, keys], seen[:, None, :, keys], *others))
    return torch.cat(outputs, 2)
