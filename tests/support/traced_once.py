"""Trace each config once a process: torch.export takes most of the time that a tiny model's conversion does."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
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
        key = type(module), _described(model.config), model.dtype
        return clone_module(_remembered(graphs, key, lambda: trace(model, module, inputs)))

    return remembered


def _described(config: PreTrainedConfig) -> str:
    described = json.loads(config.to_json_string(use_diff=False))
    described.pop("_name_or_path", None)  # a temporary folder
    return json.dumps(described)


def _remembered(kept: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
    if key not in kept:
        kept[key] = make()
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
