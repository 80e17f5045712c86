"""Find a traced parameter's tensor in a checkpoint, and check before any work that they fit together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from popcompile.adapter import Adapter
from popcompile.errors import PopcompileError
from popcompile.passes import Program
from popcompile.source import Source, TensorInfo, random_tensor


class Checkpoint:
    """The tensors of a source by the names that the traced graph uses, with what an adapter changes."""

    def __init__(self, source: Source, program: Program, dtype: torch.dtype, adapter: Adapter | None = None) -> None:
        self._source, self._adapter = source, adapter
        self._dtype = dtype
        self._shapes = parameter_shapes(program)
        self._names = {} if source.kind == "random" else self._resolve(source.tensors())
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
        tensor = self._source.read(self._names[name])
        return self._adapter.merge(name, tensor) if self._adapter else tensor

    def _resolve(self, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
        """Traced name -> checkpoint name, where every parameter is there in the right shape."""
        names: dict[str, str] = {}
        renamed = _renamed(self._source.config.model_type, tensors)
        for name, shape in self._shapes.items():
            found = next((n for n in (*_spellings(name), renamed.get(name)) if n in tensors), None)
            if found is None:
                raise PopcompileError(
                    f"{self._source.name}: the checkpoint has no tensor {name}; its config describes another model,"
                    " or files are missing"
                )
            stored = tuple(tensors[found].shape)
            if stored != shape:
                raise PopcompileError(
                    f"{self._source.name}: tensor {found} has shape {list(stored)}, its config asks for {list(shape)};"
                    " config and weights belong to different models"
                )
            if not tensors[found].dtype.is_floating_point:
                raise PopcompileError(
                    f"{self._source.name}: tensor {found} holds {str(tensors[found].dtype).removeprefix('torch.')};"
                    " give an unquantized checkpoint"
                )
            names[name] = found
        return names


def parameter_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the traced graph reads, by name, without computed buffers."""
    return {
        str(n.target): tuple(n.meta["val"].shape)
        for n in program.graphs["model"].graph.nodes
        if n.op == "get_attr" and n.users and n.target not in program.constants
    }


def _renamed(model_type: str, stored: Iterable[str]) -> dict[str, str]:
    """Name in transformers' module -> name in the checkpoint, by transformers' own rules for the model type."""
    by_class = get_checkpoint_conversion_mapping(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    rules = by_class or get_checkpoint_conversion_mapping(model_type) or []
    renamed = {name: name for name in stored}
    for rule in rules:
        if isinstance(rule, WeightRenaming):
            renamed = {name: rule.rename_source_key(new)[0] for name, new in renamed.items()}
    return {new: name for name, new in renamed.items()}


def _spellings(name: str) -> list[str]:
    """How checkpoints spell a parameter: tied weights under either name, with or without the base model's prefix."""
    spellings = [name]
    if name.endswith("embed_tokens.weight"):
        spellings.append("lm_head.weight")
    return spellings + [s.partition(".")[2] for s in spellings if "." in s]
