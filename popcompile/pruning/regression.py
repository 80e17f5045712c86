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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from popcompile.passes.layers import NORM_EPS, UNIT_NORM
from popcompile.pruning.execution import fast_products
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

    def to(self, device: torch.device) -> Calibration:
        """The maps on the device."""
        return self.each(lambda t: t.to(device))

    def constants(self) -> dict[str, Tensor]:
        """The tensors by the names that the passes InsertKVProjection and InsertBypass give them."""
        named = {f"kv_projection.{layer}": m for layer, m in self.projections.items()}
        named |= {f"bypass.{first}": m for first, m in self.bypasses.items()}
        constants = {f"{name}.{kind}": getattr(m, kind) for name, m in named.items() for kind in _KINDS}
        if named:
            constants[UNIT_NORM] = torch.ones(next(iter(named.values())).weight.shape[1])
        return constants

    @classmethod
    def of(cls, constants: Mapping[str, Tensor]) -> Calibration:
        """The maps whose `constants` these are."""
        calibration = cls()
        kinds = {"kv_projection": calibration.projections, "bypass": calibration.bypasses}
        for name in sorted({name.rpartition(".")[0] for name in constants if name != UNIT_NORM}):
            kind, _, layer = name.partition(".")
            kinds[kind][int(layer)] = AffineMap(*(constants[f"{name}.{part}"] for part in _KINDS))
        return calibration


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
        regression = _Regression(states, x, first, last, bypass and last < last_layer, products, ridge)
        calibration.projections.update(regression.projections(skip={first} if exact else set()))
        at, over = last + 1, regression.bypass_map()
        if over is not None:
            calibration.bypasses[first] = over
        if over is not None or states.model.adds_behind(last):
            x = _handed_past(states, x, last, over)
    return calibration


@dataclass
class _Sums:
    """Over all rows: inputs^T targets [hidden + 1, out], fp64, and the mean target of the first token [out], fp64."""

    cross: Tensor | float = 0.0
    sink: Tensor | float = 0.0


class _Regression:
    """The normal equations of one run: of the maps from x [N, T, hidden] to k, v and the step over the run."""

    def __init__(
        self,
        states: HiddenStates,
        x: Tensor,
        first: int,
        last: int,
        bypass: bool,
        products: torch.dtype,
        ridge: float,
    ) -> None:
        self.layers, self._bypass = range(first, last + 1), bypass
        self._states = states
        self._sums = [_Sums() for _ in range(len(self.layers) + bypass)]
        gram: Tensor | float = 0.0
        for batch in states.batches():
            cut = x[batch].to(states.model.device)
            inputs = _with_one(normalize(cut[:, 1:]).flatten(0, 1))
            gram = gram + inputs.double().T @ inputs.double()
            inputs = inputs.to(products)
            for sums, target in zip(self._sums, self._targets(batch, cut), strict=True):
                sums.sink = sums.sink + target[:, 0].double().sum(0) / len(states.rows)
                with fast_products(False):  # the Gram matrix is not rounded either
                    sums.cross = sums.cross + (inputs.T @ target[:, 1:].flatten(0, 1).to(products)).double()
        assert isinstance(gram, Tensor)
        self._strength = gram.new_full((len(gram),), ridge) * gram.diagonal()[:-1].mean()
        self._strength[-1] *= 1e-6  # the bias is free
        self._factor = torch.linalg.cholesky(gram + self._strength.diag())

    def _targets(self, batch: slice, cut: Tensor) -> Iterator[Tensor]:
        """What the maps of each layer, and then of the bypass, should make of the batch's x: [B, T, out]."""
        states, model, tokens = self._states, self._states.model, self._states.tokens(batch)
        for layer in self.layers:
            yield torch.cat(model.project(layer, states.before(layer)[batch].to(model.device), tokens), -1)
        if self._bypass:
            last = self.layers[-1]
            yield states.before(last + 1)[batch].to(model.device) - model.hand_on(last, cut, tokens)

    def projections(self, skip: set[int]) -> dict[int, AffineMap]:
        """Of all layers of the run but some."""
        return {
            layer: self._solve(sums, own_projection(self._states.model, layer))
            for layer, sums in zip(self.layers, self._sums, strict=False)
            if layer not in skip
        }

    def bypass_map(self) -> AffineMap | None:
        return self._solve(self._sums[-1], None) if self._bypass else None

    def _solve(self, sums: _Sums, prior: Tensor | None) -> AffineMap:
        """argmin |inputs W - targets|^2 + strength |W - prior|^2 for W [hidden + 1, out]; prior: None for zeros."""
        assert isinstance(sums.cross, Tensor) and isinstance(sums.sink, Tensor)
        right = sums.cross if prior is None else sums.cross + self._strength[:, None] * prior
        solved = torch.cholesky_solve(right, self._factor).float()
        return AffineMap(solved[:-1].T.contiguous(), solved[-1].clone(), sums.sink.float())


def own_projection(model: LayerwiseModel, layer: int) -> Tensor:
    """The layer's own projections as a map of [x / rms(x), 1] to k and v: [hidden + 1, keys + values], fp64.

    Read off the layer at unit vectors. Zeros where the layer's input norm is no RMS norm, so that there is no such map.
    """
    hidden = model.hidden_size
    probe = normalize(torch.randn(1, hidden, generator=torch.Generator().manual_seed(0))).to(model.device)
    basis = torch.eye(hidden, device=model.device) * hidden**0.5
    x = torch.cat((basis, torch.zeros_like(probe), probe, 2 * probe))[None]
    with fast_products(False):
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
    if begin == end:  # two runs, parted by what is added between them
        return x
    out = states.scratch()
    for layer in range(begin, end):
        for batch in states.batches():
            out[batch] = states.run_layer(layer, (x if layer == begin else out)[batch], states.tokens(batch))
    return out


def _handed_past(states: HiddenStates, x: Tensor, last: int, bypass: AffineMap | None) -> Tensor:
    """Hidden states behind a run of pruned layers, the last of which is `last`, of x before it, both [N, T, hidden]."""
    out = states.scratch()
    for batch in states.batches():
        cut = x[batch].to(states.model.device)
        cut = cut if bypass is None else cut + bypass(cut)
        out[batch] = states.model.hand_on(last, cut, states.tokens(batch))
    return out
