"""Calibrate what a pruned prefill makes in place of whole layers, in closed form.

For every run of pruned layers, from the hidden state x_cut that is handed past it, ridge regressions onto what the
whole model makes of the same text:

    KV projection   linear(x_cut / rms(x_cut)) -> projected k and v of every layer of the run (before norms and RoPE)
    bypass          linear(x_cut / rms(x_cut)) -> hidden state at the run's end - x_cut, where a kept layer follows

One Gram matrix per run, in double precision. The regression shrinks towards the layer's own projection and not towards
zero, so a layer whose input is what it always was gets its own weights back. Runs are fitted front to back, and each
sees the hidden states that a prefill with the earlier ones' maps hands it. The first token of a row is an attention
sink with outlier activations: it is left out, and its values are the mean over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from popcompile.passes.layers import NORM_EPS, UNIT_NORM
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel

#: ridge strength, relative to the mean diagonal of the Gram matrix
RIDGE = 1e-3


@dataclass(frozen=True)
class AffineMap:
    """linear(x / rms(x)): weight [out, hidden], bias [out]; sink [out] for the token at position 0."""

    weight: Tensor
    bias: Tensor
    sink: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S, out] for x [B, S, hidden], row by row from position 0."""
        out = torch.nn.functional.linear(normalize(x), self.weight, self.bias)
        out[:, 0] = self.sink
        return out


@dataclass(frozen=True)
class Calibration:
    """projections: by pruned layer, keys and values in one. bypasses: by the run's first layer."""

    projections: dict[int, AffineMap] = field(default_factory=dict)
    bypasses: dict[int, AffineMap] = field(default_factory=dict)

    def each(self, function: Callable[[Tensor], Tensor]) -> Calibration:
        """With the function's results in place of all tensors."""

        def changed(maps: dict[int, AffineMap]) -> dict[int, AffineMap]:
            return {at: AffineMap(function(m.weight), function(m.bias), function(m.sink)) for at, m in maps.items()}

        return Calibration(changed(self.projections), changed(self.bypasses))

    def constants(self) -> dict[str, Tensor]:
        """The tensors by the names that the passes InsertKVProjection and InsertBypass give them."""
        named = {f"kv_projection.{layer}": m for layer, m in self.projections.items()}
        named |= {f"bypass.{first}": m for first, m in self.bypasses.items()}
        constants = {f"{name}.{kind}": getattr(m, kind) for name, m in named.items() for kind in _KINDS}
        if named:
            constants[UNIT_NORM] = torch.ones(next(iter(named.values())).weight.shape[1])
        return constants


_KINDS = ("weight", "bias", "sink")


def normalize(x: Tensor) -> Tensor:
    """x / rms(x), [..., hidden]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)


def calibrate(
    states: HiddenStates,
    pruned: list[int],
    *,
    bypass: bool = True,
    ridge: float = RIDGE,
    products: torch.dtype = torch.float64,
) -> Calibration:
    """Fit the maps of a prefill that prunes these layers.

    products: what inputs and targets of a batch are multiplied in; sums over batches and the solution are fp64.
    """
    calibration, x, at = Calibration(), None, 0
    last_layer = states.model.num_layers - 1
    for first, last in states.model.runs(pruned):
        exact = x is None  # nothing is pruned before: the run's first layer sees its own input
        x = states.before(first) if x is None else _through_layers(states, x, at, first)
        regression = _Regression(states, x, first, last, bypass and last < last_layer, products)
        calibration.projections.update(regression.projections(ridge, skip={first} if exact else set()))
        at = last + 1
        if regression.bypass:
            calibration.bypasses[first] = regression.bypass_map(ridge)
        if regression.bypass or states.model.adds_behind(last):
            x = _handed_past(states, x, last, calibration.bypasses.get(first))
    return calibration


class _Regression:
    """The normal equations of one run: of the maps from x [N, T, hidden] to k, v and the step over the run."""

    def __init__(
        self, states: HiddenStates, x: Tensor, first: int, last: int, bypass: bool, products: torch.dtype
    ) -> None:
        self.layers, self.bypass = range(first, last + 1), bypass
        self._model = states.model
        self._gram: Tensor | float = 0.0
        self._cross: Tensor | float = 0.0
        self._sink: Tensor | float = 0.0
        for batch in states.batches():
            tokens, cut = states.tokens(batch), x[batch]
            targets = [torch.cat(self._model.project(i, states.before(i)[batch], tokens), -1) for i in self.layers]
            if bypass:
                targets.append(states.before(last + 1)[batch] - self._model.hand_on(last, cut, tokens))
            target = torch.cat(targets, -1)
            self._sink = self._sink + target[:, 0].double().sum(0) / len(states.rows)
            inputs = _with_one(normalize(cut[:, 1:]).flatten(0, 1))
            outputs = target[:, 1:].flatten(0, 1).to(products)
            self._gram = self._gram + inputs.double().T @ inputs.double()
            self._cross = self._cross + (inputs.to(products).T @ outputs).double()
        self._sizes = [t.shape[-1] for t in targets]

    def projections(self, ridge: float, skip: set[int]) -> dict[int, AffineMap]:
        prior = torch.cat([own_projection(self._model, i) for i in self.layers], -1)
        width = prior.shape[1]
        solved = self._solve(ridge, slice(0, width), prior)
        maps = self._split(solved, slice(0, width), self._sizes[: len(self.layers)])
        return {layer: m for layer, m in zip(self.layers, maps, strict=True) if layer not in skip}

    def bypass_map(self, ridge: float) -> AffineMap:
        columns = slice(sum(self._sizes[:-1]), sum(self._sizes))
        return self._split(self._solve(ridge, columns, None), columns, self._sizes[-1:])[0]

    def _solve(self, ridge: float, columns: slice, prior: Tensor | None) -> Tensor:
        """argmin |inputs W - targets|^2 + strength |W - prior|^2, the bias free: [hidden + 1, columns]."""
        assert isinstance(self._gram, Tensor) and isinstance(self._cross, Tensor)
        strength = torch.full((len(self._gram),), ridge, dtype=torch.float64) * self._gram.diagonal()[:-1].mean()
        strength[-1] *= 1e-6
        right = self._cross[:, columns]
        if prior is not None:
            right = right + strength[:, None] * prior
        return torch.cholesky_solve(right, torch.linalg.cholesky(self._gram + strength.diag()))

    def _split(self, solved: Tensor, columns: slice, sizes: list[int]) -> list[AffineMap]:
        assert isinstance(self._sink, Tensor)
        maps = solved.float().split(sizes, -1)
        sinks = self._sink[columns].float().split(sizes)
        return [
            AffineMap(m[:-1].T.contiguous(), m[-1].clone(), sink.clone()) for m, sink in zip(maps, sinks, strict=True)
        ]


def own_projection(model: LayerwiseModel, layer: int) -> Tensor:
    """The layer's own projections as a map of [x / rms(x), 1] to k and v: [hidden + 1, keys + values], fp64.

    Read off the layer at unit vectors. Zeros where the layer's input norm is no RMS norm, so that there is no such map.
    """
    hidden = model.hidden_size
    probe = normalize(torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)))
    x = torch.cat((torch.eye(hidden) * hidden**0.5, torch.zeros(1, hidden), probe, 2 * probe))[None]
    out = torch.cat(model.project(layer, x, model.blank(x.shape[1])), -1)[0].double()
    units, bias, expected = out[:hidden], out[hidden : hidden + 1], out[hidden + 1 :]
    own = torch.cat(((units - bias) / hidden**0.5, bias))
    if not torch.allclose((_with_one(probe.double()) @ own).expand(2, -1), expected, rtol=1e-2, atol=1e-2):
        return torch.zeros_like(own)
    return own


def _with_one(inputs: Tensor) -> Tensor:
    return torch.cat((inputs, inputs.new_ones(len(inputs), 1)), -1)


def _through_layers(states: HiddenStates, x: Tensor, begin: int, end: int) -> Tensor:
    """Hidden states before layer `end` of a prefill that has x before layer `begin`, both [N, T, hidden]."""
    out = states.scratch()
    for batch in states.batches():
        tokens, y = states.tokens(batch), x[batch]
        for layer in range(begin, end):
            y = states.run_layer(layer, y, tokens)
        out[batch] = y
    return out


def _handed_past(states: HiddenStates, x: Tensor, last: int, bypass: AffineMap | None) -> Tensor:
    """Hidden states behind a run of pruned layers, the last of which is `last`, of x before it, both [N, T, hidden]."""
    out = states.scratch()
    for batch in states.batches():
        cut = x[batch] if bypass is None else x[batch] + bypass(x[batch])
        out[batch] = states.model.hand_on(last, cut, states.tokens(batch))
    return out
