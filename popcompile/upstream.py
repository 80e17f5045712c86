"""What popcompile takes from other libraries that they do not promise to keep: private names, and names that changed.

No other module imports such a name or reaches into such an attribute (tests/test_upstream.py). Each entry says what it
is for and since which version it holds; where a release changes one, this is the file to edit.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

# Run outside of tracing, while a model is traced; torch 2.11.
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from transformers import PreTrainedModel

# How a checkpoint's tensors are named and merged when transformers loads them; all since transformers 5.10.
from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import dot_natural_key as dot_natural_key
from transformers.core_model_loading import rename_source_key as rename_source_key
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: The cache's name in what transformers' models and generation take and return: "cache" since transformers 5.24,
#: "past_key_values" before, whose use 5.24 reports as deprecated.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
#: the name of the other versions
OTHER_CACHE = "past_key_values" if CACHE == "cache" else "cache"


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name that a model's forward gives its cache: a repository's own code keeps the old one."""
    parameters = inspect.signature(forward).parameters
    return OTHER_CACHE if OTHER_CACHE in parameters and CACHE not in parameters else CACHE


def register_for_pipelines(name: str) -> None:
    """Let transformers' text-generation pipeline take models of the class called `name` as it takes its own.

    It compares names of classes with the values of this mapping, also in 5.24, and logs all of them as an error where
    there is none; what AutoModelForCausalLM.register adds is not looked at. The key is nobody's model type.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("popcompile", name)


def ignored_tensors(module: PreTrainedModel) -> list[str]:
    """Patterns of tensors that transformers ignores in a checkpoint of the module; since transformers 5.10."""
    return list(module._keys_to_ignore_on_load_unexpected or ())


def tied_parameters(module: PreTrainedModel) -> dict[str, str]:
    """Parameters that the module's config ties, by name; since transformers 5.10."""
    return dict(module.all_tied_weights_keys)


__all__ = [
    "WeightConverter",
    "WeightRenaming",
    "disable_current_modes",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "ignored_tensors",
    "rename_source_key",
    "tied_parameters",
]
