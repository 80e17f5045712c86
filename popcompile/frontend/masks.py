"""Which tokens a model's attention sees, as transformers' own masking functions say it.

They hand a mask's rule, a function of positions, to the implementation that is registered for it. While a model is
traced nothing is masked yet: the rule is tried on numbers, and what stands for the mask says which window it is. A
layer that takes a mask of any other rule is refused, whatever field of whichever config asks for it.

Where tokens of images see all of their image (Gemma 3), rules depend on where images are. They are then made for a
prompt that has some, before the model is traced, and tried on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from popcompile.errors import PopcompileError
from popcompile.passes import ops
from popcompile.upstream import cache_argument, disable_current_modes

#: a mask's rule: (batch index, head index, query position, key position) -> whether the query sees the key
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: a position beyond every context: what a query there does not see is behind a window
_FAR = 1 << 20
SUPPORTED = "popcompile supports causal and sliding-window attention"


class Mask:
    """Stands for a mask, and can only be handed on to attention."""

    __slots__ = ("_model", "_window", "rule", "shows_images")

    def __init__(self, model: str, window: int | None, rule: Rule | None = None, *, shows_images: bool = False) -> None:
        """window: as below, or None for a mask of another kind.

        shows_images: whether tokens of an image see all of it, what is behind them too.
        """
        self._model, self._window = model, window
        self.rule, self.shows_images = rule, shows_images

    @property
    def window(self) -> int:
        """Keys that a query sees, itself included; 0 for all up to itself.

        Raises PopcompileError for another mask than a causal one. Models make masks that none of their layers takes.
        """
        if self._window is None:
            raise PopcompileError(
                f"{self._model}: its config asks for attention that is neither causal nor a sliding window; {SUPPORTED}"
            )
        return self._window

    def _refuse(self, *_: Any) -> NoReturn:
        raise PopcompileError(f"{self._model}: computes with its attention mask; {SUPPORTED}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's and torch's questions for a protocol
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __and__ = __or__ = __invert__ = _refuse


def causal_mask(*_: Any, mask_function: Rule, config: PretrainedConfig, **__: Any) -> Mask:
    """transformers' mask interface: a `Mask` for the rule."""
    with disable_current_modes():
        return Mask(config.model_type, _window(mask_function), mask_function)


def image_masks(model: PreTrainedModel) -> dict[str, Mask]:
    """What a model that is told its tokens' types takes as its mask: a `Mask` for each type of layers.

    Raises PopcompileError where its tokens of an image see something else than all of it, beside what text sees: for
    images of `mm_tokens_per_image` tokens. Before transformers 5.15 a larger one than the window was seen beyond it.
    """
    make: Any = model.create_masks_for_generate
    with disable_current_modes():
        is_image = _prompt_with_images(getattr(model.config, "mm_tokens_per_image", 256))
        masks = make(
            config=model.config, inputs_embeds=torch.empty(1, len(is_image), 1), token_type_ids=is_image.long()[None],
            attention_mask=None, position_ids=None, **{cache_argument(make): None},
        )  # fmt: skip
        found = {kind: _window(mask.rule, is_image) for kind, mask in masks.items()} if isinstance(masks, dict) else {}
    if not found or None in found.values():
        raise PopcompileError(
            f"{type(model).__name__} sees its images by another rule than popcompile supports: an image's tokens see"
            " all of it, and what is before it"
        )
    return {kind: Mask(model.config.model_type, window, shows_images=True) for kind, window in found.items()}


def _prompt_with_images(size: int) -> Tensor:
    """Where images of so many tokens are in a prompt of _FAR + 2, bool: two near its beginning, one near its end."""
    is_image = torch.zeros(_FAR + 2, dtype=torch.bool)
    for begin in (3, size + 5, _FAR - size - 8):
        is_image[begin : begin + size] = True
    return is_image


def _window(rule: Rule, is_image: Tensor | None = None) -> int | None:
    """The window that a rule is, 0 for a causal one, None for neither.

    is_image: bool [_FAR + 2], the tokens of a prompt that are an image's and see all of it.
    """
    try:
        return _found_window(rule, is_image)
    except Exception:  # a rule that reads more than positions: images, blocks, padding
        return None


def _found_window(rule: Rule, is_image: Tensor | None) -> int | None:
    """_window, or any exception for a rule that reads more than it is given."""
    positions = torch.arange(_FAR + 2)
    ends = positions
    borders = positions[:0]
    if is_image is not None:
        ends = ops.image_ends(is_image[None], positions[None], torch.ones_like(positions)[None])[0]
        borders = (is_image[1:] != is_image[:-1]).nonzero()[:, 0]
    far = _seen(rule, torch.tensor([_FAR]), positions)[0]
    count = int(far.sum())
    window = count if count <= _FAR else 0
    special = torch.cat((borders, borders + 1, window + torch.arange(-1, 2))).clamp(min=0)
    for queries in (torch.tensor([_FAR - 1, _FAR]), torch.arange(300), *special.split(1)):
        last = ends[queries]
        keys = torch.arange(int(last.max()) + 2)
        causal = (keys <= last[:, None]) & (keys > queries[:, None] - (window or 2 * _FAR))
        if not torch.equal(_seen(rule, queries, keys), causal):
            return None
    return window


def _seen(rule: Rule, queries: Tensor, keys: Tensor) -> Tensor:
    """[queries, keys] bool. Raises TypeError for a rule that reads tensors that have no values while tracing."""
    zero = torch.zeros((), dtype=torch.int64)
    seen = rule(zero, zero, queries[:, None], keys[None])
    if type(seen) is not Tensor:
        raise TypeError(type(seen).__name__)
    return seen.expand(len(queries), len(keys))
