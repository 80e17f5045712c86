"""What the user asked for about pruning, checked, and what it comes to for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from popcompile.arguments import COUNT, NATS, POSITIVE, RATIO, SEED, require_choice
from popcompile.errors import PopcompileError
from popcompile.frontend.positions import context_length
from popcompile.pruning.picture_files import read_pictures
from popcompile.pruning.plan import MAX_KL, PROMPT_TOKENS, Options
from popcompile.pruning.request import Request, parse_request, require_request
from popcompile.pruning.search import Budget
from popcompile.pruning.text import FEWEST, SELF, WINDOW, WINDOWS
from popcompile.text.documents import read_texts

KV_PROJECTIONS = ("calibrated", "layer")


@dataclass(frozen=True)
class PruningSettings:
    """The arguments of `convert` of these names, None for its defaults.

    Raises PopcompileError where one is out of range, where two exclude each other, and where the calibration text or a
    picture cannot be read: what can be told before there is a model.
    """

    prune: str | int | float | None
    layers: str | None
    window: int | None
    prompt_tokens: int | None
    kv_projection: str
    calibration: str
    calibration_images: str | None
    calibration_texts: int
    refinement_steps: int
    max_kl: float | None
    max_ppl_ratio: float | None
    seed: int

    def __post_init__(self) -> None:
        require_choice("--kv-projection", self.kv_projection, KV_PROJECTIONS)
        kinds: dict[str, Any] = {
            "window": POSITIVE, "prompt_tokens": POSITIVE, "calibration_texts": POSITIVE, "refinement_steps": COUNT,
            "max_kl": NATS, "max_ppl_ratio": RATIO, "seed": SEED,
        }  # fmt: skip
        for name, kind in kinds.items():
            if (value := getattr(self, name)) is not None:
                kind.require(f"--{name.replace('_', '-')}", value)
        if self.calibration_texts < FEWEST:
            raise PopcompileError(
                f"--calibration-texts {self.calibration_texts}: too few to fit anything; give at least {FEWEST}"
            )
        how = require_request(self.prune, self.layers)
        if how != "auto" and not (self.max_kl is None and self.max_ppl_ratio is None):
            raise PopcompileError(
                "--max-kl and --max-ppl-ratio are budgets of --prune auto; leave them or the layers out"
            )
        if self.calibration != SELF:
            read_texts(Path(self.calibration))
        if self._pictures is not None:
            read_pictures(self._pictures, self.seed)

    @property
    def _pictures(self) -> Path | None:
        return None if self.calibration_images is None else Path(self.calibration_images)

    def for_model(
        self, config: PreTrainedConfig, *, takes_images: bool, int8_activations: bool
    ) -> tuple[Request, Options]:
        """config: of the decoder. int8_activations: whether the package rounds what its linear layers multiply with.

        Raises PopcompileError for layers that the model does not have, for lengths that its context has no room for,
        and for pictures where it takes none.
        """
        if self._pictures is not None and not takes_images:
            raise PopcompileError(
                f"--calibration-images {self._pictures}: {config.model_type} takes no images; leave the option out"
            )
        request = parse_request(config.num_hidden_layers, self.prune, self.layers)
        context = context_length(config)
        prompt_tokens = self._prompt_tokens(context)
        no_budget = self.max_kl is None and self.max_ppl_ratio is None
        options = Options(
            windows=self._windows(context, prompt_tokens, choose=request.how == "auto"),
            prompt_tokens=prompt_tokens,
            calibrated=self.kv_projection == "calibrated",
            origin=self.calibration,
            pictures=self._pictures,
            texts=self.calibration_texts,
            steps=self.refinement_steps,
            budget=Budget(max_kl=MAX_KL) if no_budget else Budget(self.max_kl, self.max_ppl_ratio),
            int8_activations=int8_activations,
            seed=self.seed,
        )
        return request, options

    def _prompt_tokens(self, context: int) -> int:
        """The length of prompts that the choice is made for. Raises PopcompileError for one that leaves no choice."""
        asked, window = self.prompt_tokens, self.window or 1
        if asked is None:
            return min(PROMPT_TOKENS, context)
        if asked > context:
            raise PopcompileError(f"--prompt-tokens {asked}: more than the model's context of {context}; give fewer")
        if asked <= window:
            raise PopcompileError(
                f"--prompt-tokens {asked}: prompts of up to {window} tokens are encoded in full, whatever is pruned;"
                " give more"
            )
        return asked

    def _windows(self, context: int, prompt_tokens: int, *, choose: bool) -> list[int]:
        """The window that was asked for, or else the default one, as far as the context and such prompts allow, and,
        where one is to be chosen, smaller ones.

        Raises PopcompileError for one that leaves no room for a prompt to prune and measure.
        """
        most = max(1, context // WINDOWS)
        if self.window is not None and self.window > most:
            raise PopcompileError(
                f"--window {self.window}: too large for the model's context of {context} tokens, for prompts that are"
                f" no longer are encoded in full; give at most {most}"
            )
        if self.window is not None:
            return [self.window]
        largest = min(WINDOW, most, max(1, prompt_tokens // 2))
        return sorted({max(1, largest // part) for part in ((1, 2, 4) if choose else (1,))}, reverse=True)
