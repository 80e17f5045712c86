"""Weights of a graph that is run layer by layer in PyTorch: all of them in memory, or read when they are needed.

A model of 8 billion parameters takes 32 GB in fp32, and what calibrates it works on one layer at a time. Where the
whole does not fit, weights stay in the checkpoint in its own dtype, and are widened as nodes read them; those that were
read last are kept, as far as there is room.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path

import psutil
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from popcompile.errors import PopcompileError
from popcompile.passes import Program
from popcompile.pruning.device import CPU
from popcompile.pruning.execution import Reader, bytes_in_fp32, device_of, widened

#: where a container's limit of memory is, in bytes: of cgroups v2 and v1
_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
#: the share of free memory that streamed weights take; the rest is for hidden states and what is fitted
_SHARE = 0.25


class Weights(ABC):
    """Parameters of a canonical graph, by name. device: where they are, and what is computed with them."""

    device: torch.device
    #: whether they are read again and again, so that nothing may hold on to them
    streamed = False

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """In fp32, if it holds floats."""

    def embeddings(self, name: str, ids: Tensor) -> Tensor:
        """Rows of the parameter, fp32: [*ids.shape, hidden] for ids of any shape."""
        return F.embedding(ids, self[name])


class HeldWeights(Weights):
    """The parameters of a graph that has real ones (execution.materialise)."""

    def __init__(self, model: fx.GraphModule) -> None:
        self._held = dict(model.named_buffers(remove_duplicate=False))  # tied ones have two names
        self.device = device_of(model)

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name]


class StreamedWeights(Weights):
    """Parameters that are read when they are needed, and forgotten where others need the room."""

    streamed = True

    def __init__(self, read: Reader, room: int, device: torch.device = CPU) -> None:
        """read: a tensor in the checkpoint's dtype (execution.parameter_reader), which is moved to the device. room:
        bytes that are kept there.
        """
        self._read, self._room, self.device = read, room, device
        self._kept: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(name, in_fp32=True)

    def embeddings(self, name: str, ids: Tensor) -> Tensor:
        """Only the rows are widened."""
        return F.embedding(ids, self._tensor(name, in_fp32=False)).float()

    def _tensor(self, name: str, in_fp32: bool) -> Tensor:
        key = name, in_fp32
        if key not in self._kept:
            tensor = self._read(name).to(self.device)
            tensor = widened(tensor) if in_fp32 else tensor
            self._make_room(tensor.nbytes)
            self._kept[key] = tensor
        self._kept.move_to_end(key)
        return self._kept[key]

    def _make_room(self, needed: int) -> None:
        held = sum(tensor.nbytes for tensor in self._kept.values())
        while self._kept and held + needed > self._room:
            held -= self._kept.popitem(last=False)[1].nbytes


def room_for_weights(program: Program, model: str, sampled: bool, device: torch.device = CPU) -> int | None:
    """Bytes of weights that may be kept on the device while the model so named is run layer by layer; None: it fits
    whole, in fp32.

    program: canonical. sampled: whether text is to be sampled from it, a token at a time, which reads all of it for
    each. Raises PopcompileError where that, or what a single layer takes, does not fit.
    """
    needed, free = bytes_in_fp32(program), free_memory(device)
    if needed <= free:
        return None
    largest = 4 * max(n.meta["val"].numel() for n in program.graphs["model"].graph.nodes if n.op == "get_attr")
    room = int(_SHARE * free)
    missing = f"takes {needed / 1e9:.1f} GB of memory, the model in fp32, and {free / 1e9:.1f} GB are free"
    if device != CPU:
        missing += f" on {device}"
    if largest > room:
        raise PopcompileError(
            f"{model}: to choose layers and to calibrate {missing}; give --kv-projection layer with --prune 1/3 or"
            " --layers, which run nothing"
        )
    if sampled:
        raise PopcompileError(
            f"{model}: to sample text from it {missing}; give --calibration FILE with text like that of your prompts,"
            " which takes a layer at a time"
        )
    return room


def free_memory(device: torch.device = CPU) -> int:
    """Bytes that this process can still take: of a GPU's, or of the machine's and the container's that it is in."""
    if device != CPU:
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            free = min(free, int(path.read_text()) - psutil.Process().memory_info().rss)
    return max(0, free)
