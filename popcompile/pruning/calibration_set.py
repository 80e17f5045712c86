"""What a conversion calibrates on, chooses by and measures: text, and prompts with images where a model takes these.

Half of the rows that maps are fitted to are text then, and a set of layers costs what the kind loses that loses more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.passes import Program
from popcompile.pruning.execution import Reader
from popcompile.pruning.held_out import HeldOut, HeldOutKinds
from popcompile.pruning.image_calibration import image_calibration
from popcompile.pruning.image_prompts import ImagePrompts, ImageSource
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.rows import AskedRows, Rows
from popcompile.pruning.steps import COMPUTED, Steps
from popcompile.pruning.text import CalibrationText, calibration_text

#: tokens of a prompt beside the smallest picture, at least: for a question, and for text
_BESIDE = 48


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of one length, but for those whose answers stand in longer prompts. images: None for text alone."""

    text: CalibrationText
    images: CalibrationText | None = None

    @property
    def fit(self) -> Rows:
        """What maps are fitted to."""
        rows = self.text.calibration
        return rows if self.images is None else rows.joined(self.images.calibration)

    @property
    def refinement(self) -> AskedRows | None:
        """Rows whose answers refinement counts."""
        of_text = self.text.retrieval_refinement
        of_images = None if self.images is None else self.images.retrieval_refinement
        return of_text.joined(of_images) if of_text is not None and of_images is not None else of_text

    def held_out(self, model: LayerwiseModel, first: int, window: int, seed: int, folder: Path) -> HeldOutKinds:
        """What decides, measured with this window; layers before `first` are never pruned."""
        return self._kinds(
            lambda kind: HeldOut(
                model, kind.held_out, first, kind.prompt, seed, window, kind.retrieval_held_out, kind.asked_tokens,
                folder,
            )
        )  # fmt: skip

    def unseen(self, model: LayerwiseModel, first: int, window: int, seed: int, folder: Path) -> HeldOutKinds:
        """What has decided nothing, as `held_out`."""
        return self._kinds(
            lambda kind: HeldOut(
                model, kind.unseen, first, kind.prompt, seed, window, kind.retrieval_unseen, kind.asked_tokens, folder
            )
        )

    def _kinds(self, measure: Callable[[CalibrationText], HeldOut]) -> HeldOutKinds:
        return HeldOutKinds(measure(self.text), None if self.images is None else measure(self.images))


def calibration_set(
    origin: str,
    program: Program,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase | None,
    images: ImageSource | None,
    *,
    texts: int,
    window: int,
    prompt_tokens: int,
    decides: bool = True,
    seed: int = 0,
    steps: Steps = COMPUTED,
    progress: Callable[[int, int], Any] | None = None,
) -> CalibrationSet:
    """Arguments are those of `calibration_text`. images: what prompts with images are made by; where the model's
    context has no room for these, self-made pictures are left out.

    Raises PopcompileError where the text or the user's pictures cannot be used.
    """
    prompts = None if images is None else ImagePrompts(images.processor, images.inputs, program, read)
    least = 0 if prompts is None else (prompts.shortest() + _BESIDE) * 5 // 4 + 1  # a prompt is four fifths of a row
    if least > program.max_positions:
        if images is not None and images.pictures is not None:
            raise PopcompileError(
                f"--calibration-images {images.pictures}: the model's context of {program.max_positions} tokens is too"
                f" short for rows with a picture ({least} are needed); leave the option out"
            )
        images, least = None, 0
    of_text = texts if images is None else texts // 2
    text = calibration_text(
        origin, program, read, tokenizer, texts=of_text, window=window, prompt_tokens=prompt_tokens, least=least,
        decides=decides, seed=seed, steps=steps, progress=progress,
    )  # fmt: skip
    if images is None or prompts is None:
        return CalibrationSet(text)
    of_images = image_calibration(
        images, prompts, program, read, text, texts=texts - of_text, seed=seed, steps=steps, progress=progress
    )
    return CalibrationSet(text, of_images)
