"""Products that are rounded to bf16 where the CPU is faster at that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from popcompile.pruning import execution
from popcompile.pruning.execution import fast_products


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this CPU has: bf16 works on all of them."""
    monkeypatch.setattr(execution, "rounds_in_avx512", lambda: True)


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("bias", [None, torch.arange(4.0)])
@pytest.mark.parametrize("function", [F.linear, torch.ops.aten.linear.default])
def test_linear_layers_are_rounded_and_nothing_else(
    function: Callable[..., torch.Tensor], bias: torch.Tensor | None
) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 8, generator=random), torch.randn(4, 8, generator=random)
    exact, product = F.linear(x, weight, bias), x @ weight.T
    expected = (x.bfloat16().double() @ weight.bfloat16().double().T).float() + (0 if bias is None else bias)
    with fast_products():
        found, other = function(x, weight, bias), x @ weight.T
        assert function(x.double(), weight.double(), None).dtype == torch.float64
        with fast_products(False):
            assert torch.equal(function(x, weight, bias), exact)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    assert torch.allclose(found, expected, atol=0.05) and torch.equal(other, product)
    assert torch.equal(F.linear(x, weight, bias), exact)
    with fast_products(False):
        assert torch.equal(F.linear(x, weight, bias), exact)


@pytest.mark.usefixtures("rounds")
def test_gradients_reach_inputs_and_weights_that_change() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=random).requires_grad_()
    weight = torch.randn(4, 8, generator=random).requires_grad_()
    (F.linear(x, weight) ** 2).sum().backward()
    assert x.grad is not None and weight.grad is not None
    exact = x.grad.clone(), weight.grad.clone()
    with fast_products():
        for change in (0.0, 1.0):
            x.grad = weight.grad = None
            with torch.no_grad():
                weight += change
            loss = (F.linear(x, weight) ** 2).sum()
            loss.backward()
            assert float(loss) == pytest.approx(float((F.linear(x.double(), weight.double()) ** 2).sum()), rel=0.02)
            if change == 0:
                for found, expected in zip((x.grad, weight.grad), exact, strict=True):
                    assert found is not None and torch.allclose(found, expected, rtol=0.05, atol=0.3)


@pytest.mark.usefixtures("rounds")
def test_rounded_weights_go_with_the_weights() -> None:
    x = torch.ones(1, 8)
    with fast_products():
        for value in range(10):  # tensors in the place of others that are gone
            assert float(F.linear(x, torch.full((1, 8), float(value)))) == 8 * value
