"""Names of transformers and torch that they do not promise to keep, each with what it is for and since when."""

# Run outside of tracing, while a model is traced; torch 2.11.
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from transformers import PreTrainedModel

# How a checkpoint's tensors are named and merged when transformers loads them; all since transformers 5.10.
from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import dot_natural_key as dot_natural_key
from transformers.core_model_loading import rename_source_key as rename_source_key


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
