"""Fake values that calls share, and calls that must not."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from popcompile.passes.fake_values import fake_value
from popcompile.upstream import FakeTensorMode

aten = torch.ops.aten
#: an operator, its arguments, its keyword arguments
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def mode() -> Any:
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake(mode: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with mode:
        return torch.empty(*shape, dtype=dtype)


def test_calls_alike_share_one_value(mode: Any) -> None:
    one, other = (fake_value(mode, aten.add.Tensor, (fake(mode, 2, 3), fake(mode, 3)), {}) for _ in range(2))
    assert one is other and one.shape == (2, 3)


@pytest.mark.parametrize("difference", ["shape", "stride", "dtype", "keyword", "type of a number", "operator"])
def test_calls_that_differ_do_not(difference: str, mode: Any) -> None:
    x, whole = fake(mode, 2, 2), fake(mode, 2, 2, dtype=torch.int64)
    calls: dict[str, tuple[Call, Call]] = {
        "shape": ((aten.mul.Scalar, (x, 1), {}), (aten.mul.Scalar, (fake(mode, 2, 3), 1), {})),
        "stride": ((aten.mul.Scalar, (x, 1), {}), (aten.mul.Scalar, (x.t(), 1), {})),
        "dtype": ((aten.mul.Scalar, (x, 1), {}), (aten.mul.Scalar, (whole, 1), {})),
        "keyword": ((aten.sum.dim_IntList, (x, [0]), {}), (aten.sum.dim_IntList, (x, [0]), {"keepdim": True})),
        "type of a number": ((aten.mul.Scalar, (whole, 1), {}), (aten.mul.Scalar, (whole, 1.0), {})),
        "operator": ((aten.mul.Scalar, (x, 1), {}), (aten.div.Scalar, (x, 1), {})),
    }
    first, second = (fake_value(mode, *call) for call in calls[difference])
    assert first is not second
    target, args, kwargs = calls[difference][1]
    with mode:
        expected = target(*args, **kwargs)
    assert (second.shape, second.stride(), second.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_free_sizes(mode: Any) -> None:
    batch = mode.shape_env.create_unbacked_symint()
    assert fake_value(mode, operator.mul, (batch, 2), {}) is fake_value(mode, operator.mul, (batch, 2), {})
    assert fake_value(mode, operator.mul, (batch, 2), {}) is not fake_value(mode, operator.mul, (batch, 3), {})


def test_values_of_real_tensors_are_no_ones_else(mode: Any) -> None:
    """A real tensor's numbers may decide: each call is computed for itself."""
    x, index = fake(mode, 4), torch.tensor([1])
    one, other = (fake_value(mode, aten.index.Tensor, (x, [index]), {}) for _ in range(2))
    assert one is not other and one.shape == other.shape == (1,)
