"""Names of transformers that its documentation does not promise, each with what it is for and since when it holds."""

# How a checkpoint's tensors are named and merged when transformers loads them; all since transformers 5.10.
from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import WeightTransform as WeightTransform
from transformers.core_model_loading import dot_natural_key as dot_natural_key
from transformers.core_model_loading import rename_source_key as rename_source_key
