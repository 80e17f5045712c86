"""Find a traced parameter's tensors in a checkpoint, and check before any work that they fit together.

Most parameters are one tensor. A layer's experts are one parameter in transformers' modules and a tensor each in most
checkpoints. Which tensors a parameter is made of is in tensor_names.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from popcompile.errors import PopcompileError
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.source import Source, TensorInfo, random_tensor
from popcompile.frontend.tensor_names import Converted, TensorNames
from popcompile.passes import Program


class Checkpoint:
    """The tensors of a source by the names that the traced graph uses, with what an adapter changes."""

    def __init__(self, source: Source, program: Program, dtype: torch.dtype, adapter: Adapter | None = None) -> None:
        self._source, self._adapter = source, adapter
        self._dtype = dtype
        self._shapes = parameter_shapes(program)
        self._found = {} if source.kind == "random" else self._resolve(source.tensors())
        if adapter:
            adapter.fit(source.name, self._shapes)

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a traced parameter, in the checkpoint's dtype or the adapter's. Raises PopcompileError."""
        if self._source.kind == "random":
            return random_tensor(name, self._shapes[name], self._dtype)
        found = self._found[name]
        tensor = found.convert(name, self._source.read) if isinstance(found, Converted) else self._source.read(found)
        return self._adapter.merge(name, tensor) if self._adapter else tensor

    def _resolve(self, stored: Mapping[str, TensorInfo]) -> dict[str, str | Converted]:
        """Traced name -> what it is made of, where all are there in the right shapes and none is left over."""
        names = self._names = TensorNames(self._source)
        resolved = {name: names.of(name) for name in self._shapes}
        for name, shape in self._shapes.items():
            self._require_fit(name, resolved[name], shape, stored)
        names.require_all_used()
        return resolved

    def _require_fit(
        self, name: str, found: str | Converted, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]
    ) -> None:
        """Raise PopcompileError for missing tensors, quantized ones, and another shape than the parameter's."""
        tensors = [found] if isinstance(found, str) else found.tensors
        shapes = sorted({stored[tensor].shape for tensor in tensors})
        if isinstance(found, str):
            subject, fits = f"tensor {found} has shape {list(shapes[0])}", shapes[0] == shape
        else:
            subject = f"tensors {tensors[0]} to {tensors[-1]} have shapes {' and '.join(str(list(s)) for s in shapes)}"
            fits = _converted_shape(name, found, stored) == shape
            if not fits and (absent := found.absent(shape[0])):
                raise self._names.missing(absent)
        if not fits:
            raise PopcompileError(
                f"{self._source.name}: {subject}, its config asks for {list(shape)};"
                " config and weights belong to different models"
            )
        for tensor in tensors:
            if not stored[tensor].dtype.is_floating_point:
                raise PopcompileError(
                    f"{self._source.name}: tensor {tensor} holds {str(stored[tensor].dtype).removeprefix('torch.')};"
                    " give an unquantized checkpoint"
                )


def _converted_shape(name: str, found: Converted, stored: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    """The shape of what the tensors make, or None where they do not go together."""
    try:
        return tuple(found.convert(name, lambda tensor: torch.empty(stored[tensor].shape, device="meta")).shape)
    except (RuntimeError, ValueError, LookupError):
        return None


def parameter_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the traced graphs read, by name, without computed buffers."""
    return {
        str(n.target): tuple(n.meta["val"].shape)
        for gm in program.graphs.values()
        for n in gm.graph.nodes
        if n.op == "get_attr" and n.users and n.target not in program.constants
    }
