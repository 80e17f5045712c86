"""Trace each config once a process: torch.export takes most of the time that a tiny model's conversion does."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from typing import TypeVar

import torch
from torch import fx, nn
from transformers import PreTrainedConfig, PreTrainedModel

from popcompile.passes import Program
from popcompile.passes.graph import clone_module
from popcompile.upstream import FakeTensor
from popcompile.vision.towers import Input

_Key, _Value = TypeVar("_Key"), TypeVar("_Value")
_Trace = Callable[[PreTrainedConfig, torch.dtype, bool], Program]
_TracePart = Callable[[PreTrainedModel, nn.Module, Mapping[str, Input]], fx.GraphModule]
#: programs that are kept, and graphs of vision-language models' other parts
_KEPT = 64
#: of a config: what no graph depends on, for the dtype that a model is traced in is given beside it
_NAMES = {"_name_or_path", "architectures", "dtype", "transformers_version"}
#: of a vision-language model's text decoder: what the graphs of its other parts do not depend on
_DECODERS = {"num_hidden_layers", "layer_types", "max_position_embeddings"}


def remembering(trace: _Trace) -> _Trace:
    """`trace`, whose programs are copied where the config was traced before. Errors are not remembered."""
    programs: OrderedDict[tuple[type, str, torch.dtype], Program] = OrderedDict()

    def remembered(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Program:
        if trust_remote_code:  # the code is not in the config
            return trace(config, dtype, trust_remote_code)
        try:
            key = type(config), _described(config), dtype
        except (TypeError, ValueError):  # a damaged one
            return trace(config, dtype, trust_remote_code)
        return _remembered(programs, key, lambda: trace(config, dtype, trust_remote_code)).clone()

    return remembered


def remembering_parts(trace: _TracePart) -> _TracePart:
    """The same of a vision-language model's tower and embedding, where its parameters are fake."""
    graphs: OrderedDict[tuple[type, str, torch.dtype], fx.GraphModule] = OrderedDict()

    def remembered(model: PreTrainedModel, module: nn.Module, inputs: Mapping[str, Input]) -> fx.GraphModule:
        if not isinstance(next(model.parameters()), FakeTensor):
            return trace(model, module, inputs)
        key = type(module), _described(model.config, _DECODERS), model.dtype
        return clone_module(_remembered(graphs, key, lambda: trace(model, module, inputs)))

    return remembered


def _described(config: PreTrainedConfig, of_decoder: Set[str] = frozenset()) -> str:
    """Equal for configs whose graphs are equal. of_decoder: fields of a text decoder that do not count."""
    described = json.loads(config.to_json_string(use_diff=False), object_hook=lambda fields: _without(fields, _NAMES))
    if "text_config" in described:
        described["text_config"] = _without(described["text_config"], of_decoder)
    return json.dumps(described)


def _without(fields: Mapping[str, object], names: Set[str]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in names}


def _remembered(kept: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
    if key not in kept:
        kept[key] = make()
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
