"""Build transformers' module of a config: its causal LM or, for the text model of a multimodal one, an LM head over it.

Some multimodal models have a text model of a type of its own, which transformers has no causal LM of: the head is a
part of the whole model there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as MODELS

from popcompile.upstream import tie


def is_headless(model_type: str) -> bool:
    """Whether transformers has a model of the type, and no causal LM."""
    return model_type in MODELS and model_type not in CAUSAL_LMS


def causal_lm(config: PretrainedConfig, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The module, without weights of a checkpoint. options: of transformers' `from_config`, `dtype` for instance.

    Raises whatever transformers raises for a config that it cannot build.
    """
    if is_headless(config.model_type) and not hasattr(config, "auto_map"):
        return _WithHead(config, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    return model


class _WithHead(PreTrainedModel):
    """A text model and an LM head, under the names that they have in transformers' causal LMs."""

    base_model_prefix = "model"

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype | None = None, **options: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config, trust_remote_code=False, dtype=dtype, **options)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        tie(self, {"lm_head.weight": f"model.{name}.weight"})
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **others: Any) -> CausalLMOutputWithPast:
        """Logits [batch, sequence, vocabulary] of ids [batch, sequence]; others: of the text model's forward."""
        out = self.model(input_ids=input_ids, **others)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))
