"""Run a program's graphs in PyTorch, with a checkpoint's weights: for sampling, importance and calibration.

What is measured is the graph that gets exported, not the module that it was traced from. Nodes of the vocabulary run as
their plain reference functions (passes/ops.py), so everything is differentiable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from popcompile.errors import PopcompileError
from popcompile.passes import Program, ops
from popcompile.passes.graph import call_nodes, clone_module, register_parameter
from popcompile.pruning.device import CPU
from popcompile.upstream import rounds_in_avx512

NO_NUMBERS = "the model's probabilities are no numbers: its activations overflow in fp32; fix the checkpoint"

#: reads a parameter by its traced name
Reader = Callable[[str], Tensor]


@contextlib.contextmanager
def fast_products(fast: bool = True) -> Iterator[None]:
    """Let matrix products of fp32 tensors round their operands to bf16 where the CPU has units for it, and on a GPU to
    TF32.

    For what hardly depends on it (README.md): sampling text, ranking and choosing layers, calibration and refinement.
    PyTorch uses AMX by a setting; for AVX-512's bf16 layers' products are rounded here. fast=False: not so, also inside
    of a block that rounds.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    try:
        with _RoundedLinear() if fast and rounds_in_avx512() else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def run_again(run: Callable[..., Tensor], *args: Any) -> Tensor:
    """What it returns; gradients run it again, with the same rounding, and hold on to nothing in between."""
    fast = torch.get_float32_matmul_precision() != "highest"
    again: Tensor = checkpoint(
        run, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), fast_products(fast))
    )
    return again


class _RoundedLinear(TorchFunctionMode):
    """Linear layers in fp32 on the CPU are computed in bf16, forward and backward. Weights are rounded once while it is
    active.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.linear, torch.ops.aten.linear.default) or kwargs:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        exact = torch.get_float32_matmul_precision() == "highest"  # in fast_products(False)
        if exact or x.device != CPU or x.dtype != torch.float32 or weight.dtype != torch.float32:
            return func(*args)
        y = F.linear(x.bfloat16(), self._rounded(weight)).float()
        return y if bias is None else y + bias

    def _rounded(self, weight: Tensor) -> Tensor:
        if weight.requires_grad:  # it changes
            return weight.bfloat16()
        if weight not in self._weights:
            self._weights[weight] = weight.bfloat16()
        return self._weights[weight]


def bytes_in_fp32(program: Program) -> int:
    """Bytes of all parameters of a canonical program in fp32."""
    nodes = [n for gm in program.graphs.values() for n in gm.graph.nodes if n.op == "get_attr"]
    return 4 * sum({n.target: n.meta["val"].numel() for n in nodes}.values())


class HeldParameters:
    """A Reader of what another one reads: in fp32 on a device, every tensor once, so that all graphs share it."""

    def __init__(self, read: Reader, device: torch.device = CPU) -> None:
        self._read, self.device = read, device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self._read(name).to(self.device).float()
        return self._held[name]


def device_of_reader(read: Reader) -> torch.device:
    """Where a reader's tensors are. A checkpoint's own are on the CPU."""
    return read.device if isinstance(read, HeldParameters) else CPU


def device_of(gm: fx.GraphModule) -> torch.device:
    """Where a graph with real weights computes."""
    return next(gm.buffers()).device


def checked(read: Reader, model: str) -> Reader:
    """`read`, which raises PopcompileError where a tensor of the model so named holds NaN or infinity."""
    finite: set[str] = set()

    def read_checked(name: str) -> Tensor:
        tensor = read(name)
        if name not in finite and not torch.isfinite(tensor).all():
            raise PopcompileError(f"{model}: tensor {name} holds NaN or infinity; fix the checkpoint")
        finite.add(name)
        return tensor

    return read_checked


def parameter_reader(program: Program, read: Reader) -> Reader:
    """Reads what get_attr nodes of the program's graphs name: parameters, constants, and what is computed of these.

    read: a parameter by its traced name; what it returns keeps its dtype, and what is computed is in fp32. All of them
    are where `read` puts its tensors; computed they are on the CPU, where they are for export.
    """
    device = device_of_reader(read)

    def source(name: str) -> Tensor:
        return program.constants[name] if name in program.constants else read(name)

    def parameter(name: str) -> Tensor:
        if (derived := program.derived.get(name)) is None:
            return source(name).to(device)
        return derived.compute([widened(source(s)).to(CPU) for s in derived.sources]).to(device)

    return parameter


def widened(tensor: Tensor) -> Tensor:
    """In fp32, if it holds floats."""
    return tensor.float() if tensor.is_floating_point() else tensor


def materialise(gm: fx.GraphModule, program: Program, read: Reader) -> fx.GraphModule:
    """A copy of the graph in fp32, with real tensors in place of its fake parameters; it computes where `read` puts
    these.

    A tensor that the checkpoint holds in fp32 is used in place; others are converted, so memory holds 4 bytes for
    each of their parameters. Raises PopcompileError as `read` does.
    """
    real, parameter = computing_in_fp32(gm, device_of_reader(read)), parameter_reader(program, read)
    for name in {str(n.target) for n in real.graph.nodes if n.op == "get_attr"}:
        register_parameter(real, name, widened(parameter(name)))
    return real


def computing_in_fp32(gm: fx.GraphModule, device: torch.device = CPU) -> fx.GraphModule:
    """A copy of the graph that casts to fp32 where it casts to a narrower float, and to the device where it names one;
    its parameters are still fake.
    """

    def changed(argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return device
        return torch.float32 if argument in (torch.float16, torch.bfloat16) else argument

    copy = clone_module(gm)
    for node in call_nodes(copy):
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), changed)
    copy.recompile()
    return copy


def call_reference(gm: fx.GraphModule, instead: Mapping[Any, Callable[..., Any]] | None = None) -> fx.GraphModule:
    """A copy of the graph that calls the vocabulary's reference functions, or those of `instead`, by operator."""
    copy = clone_module(gm)
    functions = {**ops.REFERENCE, **(instead or {})}
    for node in call_nodes(copy):
        node.target = functions.get(node.target, node.target)
    copy.recompile()
    return copy
