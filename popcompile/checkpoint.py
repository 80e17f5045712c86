"""Find a traced parameter's tensors in a checkpoint, and check before any work that they fit together.

Most parameters are one tensor. A layer's experts are one parameter in transformers' modules and a tensor each in most
checkpoints: transformers' own rules for the model type say how they are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from popcompile.adapter import Adapter
from popcompile.errors import PopcompileError
from popcompile.passes import Program
from popcompile.source import Source, TensorInfo, random_tensor
from popcompile.upstream import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    get_checkpoint_conversion_mapping,
)


@dataclass(frozen=True)
class _Merged:
    """A parameter that a checkpoint holds in parts. sources: the parts, by the pattern of `rule` that they match."""

    target: str
    rule: WeightConverter
    sources: Mapping[str, Sequence[str]]

    def merge(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, from what `read` gives for a part's name. Takes twice its memory."""
        for pattern, names in self.sources.items():
            for name in names:
                tensor: Future[Tensor] = Future()  # what transformers' loading threads would hand over
                tensor.set_result(read(name))
                self.rule.add_tensor(self.target, name, pattern, tensor)
        return next(iter(self.rule.convert(self.target).values()))


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
        tensor = found.merge(self._source.read) if isinstance(found, _Merged) else self._source.read(found)
        return self._adapter.merge(name, tensor) if self._adapter else tensor

    def _resolve(self, stored: Mapping[str, TensorInfo]) -> dict[str, str | _Merged]:
        """Traced name -> checkpoint name, or names, where every parameter is there in the right shape."""
        rules = _rules(self._source.config.model_type)
        renamed = _renamed(rules, stored)
        resolved: dict[str, str | _Merged] = {}
        for name, shape in self._shapes.items():
            found = next((n for n in (*_spellings(name), renamed.get(name)) if n in stored), None)
            resolved[name] = found if found is not None else self._parts(name, shape, rules, renamed)
            self._require_fit(resolved[name], shape, stored)
        return resolved

    def _parts(
        self, name: str, shape: tuple[int, ...], rules: Sequence[WeightTransform], renamed: Mapping[str, str]
    ) -> _Merged:
        """The tensors that a parameter is merged from. Raises PopcompileError for a missing one.

        renamed: name in transformers' module -> name in the checkpoint.
        """
        missing = name
        for rule, spelled in product(rules, _spellings(name)):
            if not isinstance(rule, WeightConverter) or len(rule.target_patterns) != 1:
                continue
            prefix, pattern, suffix = spelled.partition(rule.target_patterns[0])
            if not pattern:
                continue
            parts = {
                kind: [prefix + kind.replace("*", str(i)) + suffix for i in range(shape[0])]
                for kind in rule.source_patterns
            }
            absent = [part for part in chain(*parts.values()) if part not in renamed]
            if not absent:
                sources = {kind: [renamed[part] for part in named] for kind, named in parts.items()}
                return _Merged(spelled, rule, sources)
            if len(absent) < shape[0] * len(parts):
                missing = absent[0]
        raise PopcompileError(
            f"{self._source.name}: the checkpoint has no tensor {missing}; its config describes another model,"
            " or files are missing"
        )

    def _require_fit(self, found: str | _Merged, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]) -> None:
        """Raise PopcompileError for tensors of another shape than the parameter's, or quantized ones."""
        names = [found] if isinstance(found, str) else list(chain(*found.sources.values()))
        shapes = sorted({stored[name].shape for name in names})
        if isinstance(found, str):
            subject, fits = f"tensor {found} has shape {list(shapes[0])}", shapes[0] == shape
        else:
            subject = f"tensors {names[0]} to {names[-1]} have shapes {' and '.join(str(list(s)) for s in shapes)}"
            fits = _merged_shape(found, stored) == shape
        if not fits:
            raise PopcompileError(
                f"{self._source.name}: {subject}, its config asks for {list(shape)};"
                " config and weights belong to different models"
            )
        for name in names:
            if not stored[name].dtype.is_floating_point:
                raise PopcompileError(
                    f"{self._source.name}: tensor {name} holds {str(stored[name].dtype).removeprefix('torch.')};"
                    " give an unquantized checkpoint"
                )


def _merged_shape(found: _Merged, stored: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    """The shape of what the parts make, or None where they do not go together."""
    try:
        return tuple(found.merge(lambda name: torch.empty(stored[name].shape, device="meta")).shape)
    except RuntimeError:
        return None


def parameter_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the traced graph reads, by name, without computed buffers."""
    return {
        str(n.target): tuple(n.meta["val"].shape)
        for n in program.graphs["model"].graph.nodes
        if n.op == "get_attr" and n.users and n.target not in program.constants
    }


def _rules(model_type: str) -> Sequence[WeightTransform]:
    """transformers' own rules that turn a checkpoint of the model type into parameters of its module."""
    by_class = get_checkpoint_conversion_mapping(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    return by_class or get_checkpoint_conversion_mapping(model_type) or []


def _renamed(rules: Iterable[WeightTransform], stored: Iterable[str]) -> dict[str, str]:
    """Name in transformers' module -> name in the checkpoint."""
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
