"""A GPU that is none, to see where tensors are: those on "cuda" hold one of the CPU, which computes.

What CUDA refuses is refused: operators on tensors of two devices, but for numbers (tensors without dimensions) and
indices on the CPU; generators of the other device; a view as a NumPy array. What it cannot tell is whether CUDA has a
kernel, how fast it is, and how it rounds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

GPU = torch.device("cuda", 0)
aten = torch.ops.aten

#: operators that take tensors of two devices
_COPIES = {aten.copy_.default}
#: those whose indices, their second argument, may be on the CPU
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
#: functions that take nearly all of a model's time, by name
_PRODUCTS = {
    "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention", "conv2d",
    "conv3d", "convolution",
}  # fmt: skip
_MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


class GpuTensor(Tensor):
    """held: the tensor on the CPU that computes."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        others: list[Any] = []  # that are not on the GPU

        def held(argument: Any) -> Any:
            if isinstance(argument, GpuTensor):
                return argument.held
            if isinstance(argument, Tensor | torch.Generator):
                others.append(argument)
            return torch.device("cpu") if isinstance(argument, torch.device) else argument

        held_args, held_kwargs = _mapped(args, held), _mapped(kwargs, held)
        _require_one_device(func, args, kwargs, others)
        with torch._C.DisableTorchFunction():
            out = func(*held_args, **held_kwargs)
        if func in _COPIES and not isinstance(args[0], GpuTensor):
            return args[0]
        on_gpu = _mapped(out, lambda each: GpuTensor(each) if isinstance(each, Tensor) else each)
        return return_and_correct_aliasing(func, args, kwargs, on_gpu) if _aliases(func) else on_gpu


def _require_one_device(func: Any, args: Any, kwargs: Any, others: list[Any]) -> None:
    """Raise RuntimeError where CUDA does. others: tensors on the CPU and generators among the arguments."""
    if func is aten._assert_tensor_metadata.default and kwargs.get("device", GPU) != GPU:
        raise RuntimeError(f"Tensor device mismatch! ({func})")
    if func in _COPIES:
        return
    if func in _INDEXED and isinstance(args[0], GpuTensor):
        others = [other for other in others if not any(other is index for index in args[1])]
    for other in others:
        if isinstance(other, torch.Generator):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if other.dim() > 0:
            raise RuntimeError(f"{_MIXED} ({func})")


@cache
def _aliases(func: Any) -> bool:
    """Whether an operator returns, or changes, what it is given."""
    return any(each.alias_info is not None for each in (*func._schema.arguments, *func._schema.returns))


def _mapped(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """torch.utils._pytree takes ten times as long."""
    if isinstance(arguments, list | tuple):
        return type(arguments)([_mapped(each, change) for each in arguments])
    if isinstance(arguments, dict):
        return {name: _mapped(each, change) for name, each in arguments.items()}
    return change(arguments)


def _any_on_gpu(arguments: Any) -> bool:
    if isinstance(arguments, list | tuple):
        return any(_any_on_gpu(each) for each in arguments)
    return isinstance(arguments, GpuTensor)


class SimulatedGpu(TorchFunctionMode):
    """products: how often each function of those that take the time was called, by (name, whether on the GPU)."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[str, bool]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on_gpu = _any_on_gpu(args) or _any_on_gpu(list(kwargs.values()))
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in _PRODUCTS:
            self.products[name, on_gpu] += 1
        if func is Tensor.to and (device := _device_among((*args[1:], *kwargs.values()))) is not None:
            return _moved(args[0], device, *_without_devices(args[1:]), **_without_device(kwargs))
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if on_gpu and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if on_gpu and func is Tensor.tolist:
            return args[0].held.tolist()
        if not on_gpu and _device_among([kwargs.get("device")]) == GPU:  # a function that makes a tensor
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            needs_gradient = kwargs.pop("requires_grad", False)
            return GpuTensor(func(*args, **_without_device(kwargs))).requires_grad_(needs_gradient)
        return func(*args, **kwargs)

    def on_the_cpu(self) -> set[str]:
        """Functions that take the time and ran on the CPU."""
        return {name for (name, on_gpu), count in self.products.items() if count and not on_gpu}


def _device_among(arguments: Iterable[Any]) -> torch.device | None:
    for argument in arguments:
        if isinstance(argument, torch.device) or (isinstance(argument, str) and argument in ("cpu", "cuda", "cuda:0")):
            device = torch.device(argument)
            return GPU if device.type == "cuda" else device
    return None


def _without_devices(arguments: Iterable[Any]) -> list[Any]:
    return [argument for argument in arguments if _device_among([argument]) is None]


def _without_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "device"}


def _moved(tensor: Tensor, device: torch.device, *others: Any, **options: Any) -> Tensor:
    """others, options: of Tensor.to."""
    if device == GPU and not isinstance(tensor, GpuTensor):
        assert not (tensor.requires_grad and torch.is_grad_enabled()), "gradients do not go from device to device here"
        tensor = GpuTensor(tensor.detach().clone())
    elif device != GPU and isinstance(tensor, GpuTensor):
        tensor = tensor.held.clone()
    return tensor.to(*others, **options) if others or options else tensor


@contextlib.contextmanager
def simulated_gpu(free: int = 10**12) -> Iterator[SimulatedGpu]:
    """PyTorch has one GPU, with so many bytes free."""
    simulated = SimulatedGpu()
    run_backward = torch.autograd._engine_run_backward

    def run_backward_there(*arguments: Any, **options: Any) -> Any:
        with simulated:  # for what gradients run again; no mode is active in a function that it was asked about
            return run_backward(*arguments, **options)

    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "mem_get_info": lambda device: (free, 10**12)}
    backward = patch.object(torch.autograd, "_engine_run_backward", run_backward_there)
    with patch.multiple(torch.cuda, **cuda), backward, simulated:
        yield simulated
