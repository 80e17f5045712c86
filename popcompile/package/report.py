"""What report.json says in numbers. Whoever reads a report imports this, and neither torch nor the compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

#: tokens of the prompts that FLOPs in a report are of, where it does not say (passes/flops.py)
REFERENCE_TOKENS = 1024
#: and of an image, where images have any size
REFERENCE_IMAGE_TOKENS = 256


@dataclass(frozen=True)
class Loss:
    """What pruning costs against the whole model; KL(whole || pruned) in nats.

    first_token_kl, its standard error over rows (NaN for one row), first_token_agreement: of tokens after a prompt.
    kl: of the continuation's tokens after that one, teacher-forced; agreement, ppl_ratio: of all of its tokens.
    Agreement is that of the likeliest token.
    Of the tokens of answers that stand in the prompt, teacher-forced: retrieval_found, the share of them that is the
    likeliest to the whole model; of these, retrieval_kl, its standard error over rows, and retrieval_kept, the share
    that is the likeliest after pruning as well. None: not measured, or nothing found; the error: in one row at most.
    at_least: some of these numbers are lower bounds, for measuring ended where worst_kl was over the budget.
    images: of prompts with images, where the model takes them; all other numbers are of text then.
    """

    first_token_kl: float
    first_token_kl_error: float
    first_token_agreement: float
    kl: float
    agreement: float
    ppl_ratio: float
    retrieval_found: float | None = None
    retrieval_kl: float | None = None
    retrieval_kept: float | None = None
    retrieval_kl_error: float | None = None
    at_least: bool = False
    images: Loss | None = None

    @property
    def is_bound(self) -> bool:
        """Whether worst_kl is a lower bound."""
        return self.at_least or (self.images is not None and self.images.at_least)

    @property
    def worst_kl(self) -> float:
        """Of the first token, of those after it, or of answers found in the prompt, of text or of prompts with images:
        what the choice goes by.
        """
        of_images = 0.0 if self.images is None else self.images.worst_kl
        return max(self.first_token_kl, self.kl, self.retrieval_kl or 0.0, of_images)

    @property
    def worst_ppl_ratio(self) -> float:
        """Of text or of prompts with images."""
        return self.ppl_ratio if self.images is None else max(self.ppl_ratio, self.images.ppl_ratio)

    @property
    def worst_kl_error(self) -> float:
        """The standard error of worst_kl; NaN where it is not known."""
        if self.images is not None and self.worst_kl == self.images.worst_kl:
            return self.images.worst_kl_error
        if self.worst_kl == self.first_token_kl:
            return self.first_token_kl_error
        if self.worst_kl == self.retrieval_kl and self.retrieval_kl_error is not None:
            return self.retrieval_kl_error
        return math.nan


@dataclass(frozen=True)
class Importance:
    """Entry i of every list belongs to layer i, or, where layers have `blocks`, to block i % len(blocks) of layer
    i // len(blocks). Numbers are squared derivatives of nats by a gate, without unit.

    The errors are standard errors of the mean over texts, NaN for a single text.
    """

    prefill: list[float]
    decode: list[float]
    prefill_error: list[float]
    decode_error: list[float]
    blocks: tuple[str, ...] = ()


def format_layers(layers: list[int]) -> str:
    """[17, 20, 21, 22] -> "17,20-22"; no layers -> "none"."""
    groups = groupby(enumerate(layers), lambda place: place[1] - place[0])
    runs = [[layer for _, layer in group] for _, group in groups]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
