"""Fake values (shape, strides, dtype) that calls compute, each computed once for calls that are alike.

PyTorch takes milliseconds for one on symbolic shapes, and a decoder repeats its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from popcompile.upstream import FakeTensor, disable_fake_tensor_cache, symbolic_dispatch

#: the attribute of a fake mode that holds what was computed in it; it goes when the mode goes
_KNOWN = "popcompile_values"


def fake_value(mode: Any, target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What `target` computes of these fake values in that fake mode. Calls that are alike share one value, so nobody
    may change it in place.
    """
    known = vars(mode).setdefault(_KNOWN, {})
    call = alike(target, args, kwargs)
    if call is None:
        return _computed(mode, target, args, kwargs)
    if call not in known:
        known[call] = _computed(mode, target, args, kwargs)
    return known[call]


def alike(target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Hashable | None:
    """Equal for calls that compute equal shapes and types; None where the numbers in an argument may decide."""
    try:
        return target, _signature(args), _signature(kwargs)
    except _OwnValueError:
        return None


def _computed(mode: Any, target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    with disable_fake_tensor_cache(mode), mode, symbolic_dispatch(), torch.no_grad():
        return target(*args, **kwargs)


class _OwnValueError(Exception):
    """An argument whose numbers, and not its shape alone, may decide what a call computes."""


def _signature(value: Any) -> Any:
    """Equal for arguments of which every operator computes equal shapes and types."""
    if isinstance(value, FakeTensor) and value.constant is None:
        return value.dtype, value.device, _signature(value.shape), _signature(value.stride())
    if isinstance(value, Tensor) or not isinstance(value, Hashable | list | Mapping | slice):
        raise _OwnValueError
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value), value.node.expr
    if isinstance(value, list | tuple):
        return tuple(_signature(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((key, _signature(v)) for key, v in value.items())
    if isinstance(value, slice):
        return slice, _signature((value.start, value.stop, value.step))
    return type(value), value  # 1, 1.0 and True are equal
