"""Write a package's external data file, one tensor at a time.

Both graphs point into one file, each initializer stored once under its parameter's name. Tensors are read from the
checkpoint, computed where a pass folded an expression, converted, checked and written in turn, so memory holds one
tensor and not the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from popcompile.passes import Program

#: initializers begin at multiples of this, so that runtimes can map them into memory
ALIGNMENT = 4096

#: reads a checkpoint tensor by its traced name
Reader = Callable[[str], torch.Tensor]


class WeightError(ValueError):
    """A checkpoint tensor that does not fit the model, or that is not finite."""


@dataclass(frozen=True)
class Placement:
    """Where an initializer is in the data file, in bytes."""

    offset: int
    length: int


def pending_initializers(models: Mapping[str, ir.Model]) -> dict[str, ir.Value]:
    """Initializers without a value, of all graphs together, by name.

    Raises WeightError where two graphs disagree about one.
    """
    found: dict[str, ir.Value] = {}
    for model in models.values():
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                other = found.setdefault(name, value)
                if (other.shape, other.dtype) != (value.shape, value.dtype):
                    raise WeightError(f"the graphs disagree about {name}: {other.shape} and {value.shape}")
    return found


def data_size(pending: Mapping[str, ir.Value]) -> int:
    """Bytes of the data file, alignment included."""
    return sum(-(-_bytes(value) // ALIGNMENT) * ALIGNMENT for value in pending.values())


def _bytes(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    count = 1
    for dim in value.shape:
        count *= int(dim)  # type: ignore[arg-type]  # parameters have fixed shapes
    return int(count * value.dtype.itemsize)


def write_weights(
    path: Path,
    models: Mapping[str, ir.Model],
    program: Program,
    read: Reader,
    progress: Callable[[str, int], Any] | None = None,
) -> dict[str, Any]:
    """Write the data file and point the models' initializers into it.

    progress(name, bytes) is called after every tensor. Returns {"sha256", "size"} of the file.
    Raises WeightError, OSError.
    """
    pending = pending_initializers(models)
    digest = hashlib.sha256()
    placements: dict[str, Placement] = {}
    with path.open("wb") as file:
        for name, value in pending.items():
            data = _value(name, value, program, read)
            view = data.reshape(-1).view(torch.uint8).numpy().data
            padding = bytes(-file.tell() % ALIGNMENT)
            for chunk in (padding, view):
                file.write(chunk)
                digest.update(chunk)
            placements[name] = Placement(file.tell() - len(view), len(view))
            if progress:
                progress(name, len(view))
        size = file.tell()
    for model in models.values():
        point_to_file(model, path, placements)
    return {"sha256": digest.hexdigest(), "size": size}


def _value(name: str, value: ir.Value, program: Program, read: Reader) -> torch.Tensor:
    """One initializer's tensor, in the graph's dtype."""

    def source(source_name: str) -> torch.Tensor:
        return program.constants[source_name] if source_name in program.constants else read(source_name)

    derived = program.derived.get(name)
    tensor = derived.compute([source(s) for s in derived.sources]) if derived else source(name)
    assert value.dtype is not None and value.shape is not None
    expected = tuple(value.shape.numpy())
    if tuple(tensor.shape) != expected:
        raise WeightError(f"tensor {name} has shape {list(tensor.shape)}, the config asks for {list(expected)}")
    if tensor.is_floating_point():
        if not _is_finite(tensor):
            raise WeightError(f"tensor {name} holds NaN or infinity")
        target = _torch_dtype(value.dtype)
        tensor = tensor.to(target)
        if not _is_finite(tensor):
            raise WeightError(f"tensor {name} has values beyond the range of {target}".replace("torch.", ""))
    return tensor.contiguous()


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN or infinity, told by the extremes: torch.isfinite makes copies of the tensor."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)) if tensor.numel() else True


def _torch_dtype(dtype: ir.DataType) -> torch.dtype:
    return {
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
    }[dtype]


def point_to_file(model: ir.Model, path: Path, placements: Mapping[str, Placement]) -> None:
    """Give the initializers that have no value their place in the data file at `path`."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None and value.shape is not None
            value.const_value = ir.ExternalTensor(
                path.name,
                placements[name].offset,
                placements[name].length,
                value.dtype,
                shape=value.shape,  # type: ignore[arg-type]  # parameters have fixed shapes
                name=name,
                base_dir=path.parent,
            )
