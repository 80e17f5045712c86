"""Which tokens a model's attention sees, as transformers' own masking functions say it.

They hand a mask's rule, a function of positions, to the implementation that is registered for it. While a model is
traced nothing is masked yet: the rule is tried on numbers, and what stands for the mask says which window it is. A
layer that takes a mask of any other rule is refused, whatever field of whichever config asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig

from popcompile.errors import PopcompileError
from popcompile.upstream import disable_current_modes

#: a mask's rule: (batch index, head index, query position, key position) -> whether the query sees the key
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: a position beyond every context: what a query there does not see is behind a window
_FAR = 1 << 20
SUPPORTED = "popcompile supports causal and sliding-window attention"


class Mask:
    """Stands for a mask, and can only be handed on to attention."""

    __slots__ = ("_model", "_window")

    def __init__(self, model: str, window: int | None) -> None:
        """window: as below, or None for a mask of another kind."""
        self._model, self._window = model, window

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
        try:
            window = _window(mask_function)
        except Exception:  # a rule that reads more than positions: images, blocks, padding
            window = None
    return Mask(config.model_type, window)


def _window(rule: Rule) -> int | None:
    """The window that a rule is, 0 for a causal one, None for neither."""
    far = _seen(rule, torch.tensor([_FAR]), torch.arange(_FAR + 2))[0]
    count = int(far.sum())
    window = count if count <= _FAR else 0
    for queries, keys in (
        (torch.tensor([_FAR - 1, _FAR]), torch.arange(_FAR + 2)),
        (torch.arange(300), torch.arange(302)),
        (window + torch.arange(-1, 2), torch.arange(window + 3)),
    ):
        query, key = queries[:, None], keys[None]
        causal = (key <= query) & (key > query - (window or 2 * _FAR))
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
