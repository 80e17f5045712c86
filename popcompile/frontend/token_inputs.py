"""What a traced decoder is given of its tokens, beside the cache: ids, or embeddings of text and images.

    text                  input_ids [batch, sequence], attention_mask [batch, total]
    text and images       inputs_embeds [batch, sequence, width], attention_mask [batch, total],
                          position_ids [axes, batch, sequence] where RoPE has several positions for a token

Embeddings of images are the vision tower's affair. Each is followed by what else the decoder reads of its token:

    DeepStack    D features [hidden], which are added to the hidden states behind the first D layers; zeros for text
    Gemma 3      1 for a token of an image, which sees all of that, also what is behind it; 0 for text

position_ids are what M-RoPE reads; a token's slot in the cache, and what text attends to, follow from attention_mask
alone.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from popcompile.errors import PopcompileError
from popcompile.frontend.causal_lm import causal_lm
from popcompile.frontend.masks import Mask, image_masks
from popcompile.passes.graph import MASK, POSITIONS, TOKENS
from popcompile.upstream import add_features_to_all_tokens, cache_argument

SUPPORTED = (
    "popcompile supports vision-language models whose decoder takes embeddings and positions of M-RoPE, or sees its"
    " images in both directions"
)
_FEATURES = "deepstack_visual_embeds"
#: says which tokens are images', for masks
_TYPES = "token_type_ids"
#: what the modules of a vision-language model may be given. Whatever else they take would change what is computed.
_UNDERSTOOD = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache",
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "labels",
    "logits_to_keep",
    "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "rope_deltas",
    "mm_token_type_ids", "mm_encoder_outputs", "visual_pos_masks", _FEATURES, _TYPES,
}  # fmt: skip


class TokenInputs(ABC):
    """Inputs of tokens, and how a model is run on them."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """In order. Of a model with images they are known once it is built."""

    @abstractmethod
    def module(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """The model that takes them, for the names of its tensors; options are those of `from_config`."""

    def build(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """The model, to be traced. Raises PopcompileError for one that takes other inputs than these."""
        return self.module(config, **options)

    @abstractmethod
    def examples(self, batch: int, new: int, total: int, dtype: torch.dtype) -> list[Tensor]:
        """Values of some size: `new` tokens in each of `batch` rows, `total` with the past."""

    @abstractmethod
    def dimensions(self, batch: Any, sequence: Any, total: Any) -> list[dict[int, Any]]:
        """Which axes of each input are free, and what they are called."""

    @abstractmethod
    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The part of the model that is traced."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, given: list[Tensor], slots: Tensor, cache: Any) -> Tensor:
        """Logits of every token [batch, sequence, vocabulary]. slots: theirs in the cache [batch, sequence]."""

    def is_image(self, given: list[Tensor]) -> Tensor | None:
        """Which tokens see all of their image [batch, sequence] bool; None where attention is causal for all."""
        return None


class Ids(TokenInputs):
    names = (TOKENS[0], MASK)

    def module(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        return causal_lm(config, **options)

    def examples(self, batch: int, new: int, total: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(batch, new, dtype=torch.int64), torch.ones(batch, total, dtype=torch.int64)]

    def dimensions(self, batch: Any, sequence: Any, total: Any) -> list[dict[int, Any]]:
        return [{0: batch, 1: sequence}, {0: batch, 1: total}]

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model

    def logits(self, model: PreTrainedModel, given: list[Tensor], slots: Tensor, cache: Any) -> Tensor:
        named = {cache_argument(model.forward): cache}
        return model(input_ids=given[0], position_ids=slots, use_cache=True, **named).logits


class Embeddings(TokenInputs):
    """hidden: features of a hidden state. features: D, the number of such that follow each embedding."""

    def __init__(self, hidden: int, features: int) -> None:
        self.hidden, self.features = hidden, features
        #: of M-RoPE's positions, as the model that was built has them; 0 where a token's position is its slot
        self.axes = 0
        #: by type of layer, of a model that sees its images in both directions
        self.masks: dict[str, Mask] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return (TOKENS[1], MASK, *([POSITIONS] if self.axes else []))

    @property
    def width(self) -> int:
        """Columns of inputs_embeds."""
        return (1 + self.features) * self.hidden + bool(self.masks)

    def module(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, **options)
        return model

    def build(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Raises PopcompileError for a model that takes more of its images than these, or nothing but embeddings."""
        model = self.module(config, **options)
        decoder = self.decoder(model)
        for module in (model, decoder):
            named = (p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD)
            if other := sorted({p.name for p in named} - _UNDERSTOOD):
                raise PopcompileError(f"{type(module).__name__} takes {other[0]}, which is not supported; {SUPPORTED}")
        if _TYPES in inspect.signature(model.forward).parameters:
            self.masks = image_masks(model)
        sections = [section for m in decoder.modules() if (section := getattr(m, "mrope_section", None))]
        if not sections and not self.masks:
            raise PopcompileError(
                f"{type(decoder).__name__} has one position for each token and sees images as text; {SUPPORTED}"
            )
        self.axes = len(sections[0]) if sections else 0
        if (_FEATURES in inspect.signature(decoder.forward).parameters) != bool(self.features):
            raise PopcompileError(f"{type(decoder).__name__} and its config disagree about DeepStack; fix the config")
        if self.features:
            add_features_to_all_tokens(decoder)
        return model

    def examples(self, batch: int, new: int, total: int, dtype: torch.dtype) -> list[Tensor]:
        inputs = [torch.zeros(batch, new, self.width, dtype=dtype), torch.ones(batch, total, dtype=torch.int64)]
        return inputs + ([torch.zeros(self.axes, batch, new, dtype=torch.int64)] if self.axes else [])

    def dimensions(self, batch: Any, sequence: Any, total: Any) -> list[dict[int, Any]]:
        inputs = [{0: batch, 1: sequence}, {0: batch, 1: total}]
        return inputs + ([{1: batch, 2: sequence}] if self.axes else [])

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.get_decoder()

    def is_image(self, given: list[Tensor]) -> Tensor | None:
        return given[0].select(2, -1).bool() if self.masks else None

    def logits(self, model: PreTrainedModel, given: list[Tensor], slots: Tensor, cache: Any) -> Tensor:
        embeddings, _, *position_ids = given
        own, *rest = embeddings.split(self.hidden, dim=2) if self.width > self.hidden else (embeddings,)
        features: list[Tensor] = rest[: self.features]
        named: dict[str, Any] = {cache_argument(model.forward): cache}
        if self.masks:
            named["attention_mask"] = self.masks

        def with_features(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
            return args, {**kwargs, _FEATURES: features}

        # models make them of pixels alone, and hand them to the decoder
        hook = self.decoder(model).register_forward_pre_hook(with_features, with_kwargs=True) if features else None
        try:
            positions = position_ids[0] if position_ids else slots
            return model(inputs_embeds=own, position_ids=positions, use_cache=True, **named).logits
        finally:
            if hook is not None:
                hook.remove()


def token_inputs(config: PretrainedConfig) -> TokenInputs:
    """What the decoder of this config is given."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return Ids()
    return Embeddings(decoder_config(config).hidden_size, len(getattr(vision, "deepstack_visual_indexes", None) or ()))


def decoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text decoder: of a vision-language model, the one inside."""
    return config if getattr(config, "vision_config", None) is None else config.get_text_config(decoder=True)
