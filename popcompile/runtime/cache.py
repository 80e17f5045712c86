"""The key/value cache, which the graphs write in place, on the device that they run on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort
import torch
import torch.utils.dlpack
from torch import Tensor

#: slots by which a cache grows, at least
_CACHE_STEP = 256


@dataclass
class KVCache:
    """Keys and values of every layer, in the order of the graphs' inputs.

    values: [batch, kv_heads, slots, head_size] each, on the provider's device; the graphs write into them.
    lengths: tokens of every row; slots past them hold nothing that is read.
    deltas: of every row, the position of its next token less its slot, which is not 0 behind images.
    """

    values: list[ort.OrtValue]
    lengths: list[int]
    device: str = "cpu"
    deltas: list[int] = field(default_factory=list)
    #: of a stage's session to `values`, as input and output, while they stay
    bindings: dict[str, ort.IOBinding] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.deltas = self.deltas or [0] * len(self.lengths)

    @property
    def slots(self) -> int:
        return int(self.values[0].shape()[2])

    def tensors(self) -> list[Tensor]:
        """What holds tokens, as torch tensors on the CPU: views, where the values live there."""
        used = max(self.lengths)
        return [to_torch(v)[:, :, :used] for v in self.values]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        self.values = [to_ort(t, self.device) for t in tensors]
        self.bindings = {}

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens a row, and for some after them."""
        if slots <= self.slots:
            return
        shape, kind = self.values[0].shape(), self.values[0].element_type()
        shape[2] = with_room(slots)
        if any(self.lengths):
            self.replace([_widen(t, shape) for t in self.tensors()])
        else:
            self.values = [ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self.device) for _ in self.values]
            self.bindings = {}

    def row(self, index: int) -> KVCache:
        """A cache of one row, without the slots that it does not use."""
        length = self.lengths[index]
        rows = (t[index : index + 1, :, :length].contiguous() for t in self.tensors())
        return KVCache([to_ort(t, self.device) for t in rows], [length], self.device, [self.deltas[index]])

    def assign(self, rows: Sequence[KVCache]) -> None:
        """Take the rows of other caches, one each, in place of those held."""
        self.lengths, self.deltas = [r.lengths[0] for r in rows], [r.deltas[0] for r in rows]
        slots = max(self.lengths)
        padded = ([_widen(t, (*t.shape[:2], slots, t.shape[3])) for t in r.tensors()] for r in rows)
        self.replace([torch.cat(parts) for parts in zip(*padded, strict=True)])

    def packed(self, begin: int, end: int) -> Tensor:
        """Slots [begin, end) of a cache of one row, copied into one tensor on the CPU: [keys and values of every layer,
        kv_heads, end - begin, head_size].
        """
        return torch.stack([t[0, :, begin:end] for t in self.tensors()])

    @classmethod
    def unpacked(cls, packed: Tensor, device: str, delta: int = 0) -> KVCache:
        """The cache of one row whose first slots hold what `packed` returned, copied, with room behind them.

        delta: as in `deltas`.
        """
        used = packed.shape[2]
        shape = (*packed.shape[:2], used + _CACHE_STEP, packed.shape[3])
        return cls([to_ort(t[None], device) for t in _widen(packed, shape)], [used], device, [delta])

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        values = [to_ort(t.clone(memory_format=torch.contiguous_format), self.device) for t in self.tensors()]
        return KVCache(values, copy.copy(self.lengths), self.device, copy.copy(self.deltas))


def with_room(slots: int) -> int:
    """How many slots a cache gets that is to have `slots`: a quarter more, so that it seldom grows."""
    return slots + max(_CACHE_STEP, slots // 4)


def _widen(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor at the beginning of a larger one."""
    wider = tensor.new_empty(tuple(shape))
    wider[:, :, : tensor.shape[2]] = tensor
    return wider


def to_torch(value: ort.OrtValue) -> Tensor:
    return torch.utils.dlpack.from_dlpack(on_device(value, "cpu"))


def to_ort(tensor: Tensor, device: str = "cpu") -> ort.OrtValue:
    return on_device(ort.OrtValue.from_dlpack(tensor), device)  # owns the tensor, as do torch tensors made of it later


def on_device(value: ort.OrtValue, device: str) -> ort.OrtValue:
    """The value, or a copy of it where it lives elsewhere."""
    if value.device_name() == device:
        return value
    copied = ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), device)
    if all(value.shape()):
        copied.update_inplace(value)
    return copied
