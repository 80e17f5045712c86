"""What PopForCausalLM remembers and returns: its cache, and outputs that have it under both of its names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from popcompile.errors import PopcompileError
from popcompile.runtime.cache import KVCache
from popcompile.runtime.embeddings import RowImages
from popcompile.upstream import CACHE, OTHER_CACHE


class PopCache(Cache):
    """What the model remembers of the rows fed so far, for transformers' generation loop.

    It belongs to one model and grows in place, as transformers' DynamicCache does; copy.deepcopy branches it.
    """

    def __init__(self, kv: KVCache) -> None:
        super().__init__(layers=[])
        self.kv = kv
        #: [batch, columns fed] bool, in the caller's layout: which columns are tokens that the cache holds
        self.seen = torch.zeros((len(kv.lengths), 0), dtype=torch.bool)
        #: image tokens of every row, by kind, and the slot behind the last of them
        self.images: list[dict[str, int]] = [{"image": 0, "video": 0} for _ in kv.lengths]
        self.image_ends = [0] * len(kv.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        return self.seen.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # it grows; the model's context is checked where tokens come in

    def __len__(self) -> int:
        return len(self.kv.values) // 2

    def __repr__(self) -> str:
        return f"PopCache(lengths={self.kv.lengths})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PopCache:
        other = PopCache(copy.deepcopy(self.kv, memo))
        other.seen = self.seen.clone()
        other.images, other.image_ends = copy.deepcopy(self.images), list(self.image_ends)
        return other

    def note_images(self, images: Sequence[RowImages], before: Sequence[int]) -> None:
        """Remember images of every row that were fed. before: the rows' lengths before that."""
        for row, (seen, length) in enumerate(zip(images, before, strict=True)):
            for kind, count in seen.tokens.items():
                self.images[row][kind] += count
            if seen.places:
                self.image_ends[row] = length + seen.places[-1].end

    @property
    def batch_size(self) -> int:
        return len(self.kv.lengths)

    @property
    def is_linear(self) -> list[bool]:
        """Of every layer. The loop of transformers 5.24 encodes a cache's whole text again where all are linear."""
        return [False] * len(self)

    is_sliding = is_dummy = is_linear
    is_initialized = property(lambda _: True)
    is_croppable = is_compileable = property(lambda _: False)

    # the names of transformers before 5.24
    get_max_cache_shape = get_max_length
    max_batch_size = batch_size
    max_cache_len = property(get_max_length)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def forget(self, kept: int) -> None:
        """Forget all tokens of a single row of text but the first `kept`."""
        self.kv.lengths, self.seen = [kept], self.seen[:, :kept]

    def hide(self, seen: Tensor) -> None:
        """Forget the columns that a later mask hides: pads that generation put behind a finished row."""
        if bool((seen & ~self.seen).any()):
            raise PopcompileError(
                "attention_mask has a 1 for a column that was padding when it was fed; give the same mask again,"
                " followed by ones for the new tokens"
            )
        for row in (self.seen & ~seen).any(1).nonzero().flatten().tolist():
            kept = seen[row][self.seen[row]]  # of the cached tokens, in their order
            length = int(kept.sum())
            if not bool(kept[:length].all()):
                raise PopcompileError(
                    "attention_mask hides cached tokens before others; the cache can only forget its last ones, start"
                    " again without past_key_values"
                )
            if length < self.image_ends[row]:
                raise PopcompileError(
                    "attention_mask hides cached tokens of an image, or text before it; the cache can only forget text"
                    " after the last image, start again without past_key_values"
                )
            self.kv.lengths[row] = length
        self.seen = seen

    def _refuse(self, *_: object, **__: object) -> Any:
        raise PopcompileError(
            "a PopCache cannot be reordered, cropped or updated; it serves greedy search and sampling"
        )

    update = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse
    activate_past_recording = reset = early_initialization = prefetch = offload = _refuse


def under_both_names(output: type) -> type:
    """Let an output of transformers have its cache as `.past_key_values` and as `.cache`, without a warning."""
    setattr(output, OTHER_CACHE, property(lambda self: getattr(self, CACHE)))
    return output


@under_both_names
@dataclass
class PopOutput(CausalLMOutputWithPast):
    """Of PopForCausalLM: logits, and the cache as `past_key_values` and `cache`."""


@under_both_names
@dataclass
class PopGenerateOutput(GenerateDecoderOnlyOutput):
    """Of its `generate(return_dict_in_generate=True)`: sequences, what was asked for, the cache as both."""


def generated(output: Any, keep_cache: bool) -> Any:
    """What transformers' loop returned, tokens or its own output, as a PopGenerateOutput."""
    if isinstance(output, Tensor):
        return output
    return PopGenerateOutput(**{name: value for name, value in output.items() if keep_cache or name != CACHE})
