"""Trace each config once a process: torch.export takes most of the time that a tiny model's conversion does."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from popcompile.passes import Program

_Trace = Callable[[PreTrainedConfig, torch.dtype, bool], Program]
#: programs that are kept
_KEPT = 64


def remembering(trace: _Trace) -> _Trace:
    """`trace`, whose programs are copied where the config was traced before. Errors are not remembered."""
    programs: OrderedDict[tuple[type, str, torch.dtype], Program] = OrderedDict()

    def remembered(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Program:
        if trust_remote_code:  # the code is not in the config
            return trace(config, dtype, trust_remote_code)
        try:
            described = json.loads(config.to_json_string(use_diff=False))
        except (TypeError, ValueError):  # a damaged one
            return trace(config, dtype, trust_remote_code)
        described.pop("_name_or_path", None)  # a temporary folder
        key = type(config), json.dumps(described), dtype
        if key not in programs:
            programs[key] = trace(config, dtype, trust_remote_code)
            if len(programs) > _KEPT:
                programs.popitem(last=False)
        programs.move_to_end(key)
        return programs[key].clone()

    return remembered
