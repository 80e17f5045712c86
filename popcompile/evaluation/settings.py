"""What an evaluation is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from popcompile.arguments import COUNT, POSITIVE, SEED
from popcompile.errors import PopcompileError
from popcompile.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from popcompile.package.manifest import Manifest


@dataclass(frozen=True)
class EvaluationSettings:
    """As the arguments of `evaluate`, in the order of the report."""

    prompts: int
    prompt_tokens: int
    continuation_tokens: int
    greedy_prompts: int
    greedy_tokens: int
    retrieval_prompts: int
    seed: int
    provider: str

    def require(self) -> None:
        """Raises PopcompileError where a number is none of its kind."""
        POSITIVE.require("--prompts", self.prompts)
        POSITIVE.require("--prompt-tokens", self.prompt_tokens)
        POSITIVE.require("--continuation-tokens", self.continuation_tokens)
        COUNT.require("--greedy-prompts", self.greedy_prompts)
        POSITIVE.require("--greedy-tokens", self.greedy_tokens)
        COUNT.require("--retrieval-prompts", self.retrieval_prompts)
        SEED.require("--seed", self.seed)

    def require_fit(self, manifest: Manifest) -> None:
        """Raises PopcompileError where the package has no room for such prompts, or encodes them in full."""
        limit = manifest.context_length
        if self.prompt_tokens + self.continuation_tokens > limit:
            raise PopcompileError(
                f"--prompt-tokens {self.prompt_tokens} and --continuation-tokens {self.continuation_tokens} are more"
                f" than the model's context of {limit}; lower one of them"
            )
        if manifest.pruned and self.prompt_tokens <= manifest.window:
            raise PopcompileError(
                f"--prompt-tokens {self.prompt_tokens}: the package encodes prompts of up to {manifest.window} tokens"
                " in full, which loses nothing; give more"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"confidence": CONFIDENCE, "resamples": RESAMPLES}
