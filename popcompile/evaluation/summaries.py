"""Scores of prompts, summed up with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from popcompile.evaluation.bootstrap import estimate
from popcompile.evaluation.metrics import compare
from popcompile.evaluation.questions import KINDS, Question
from popcompile.package.evaluation import AnswerShares, CodeShares, Estimate, Evaluation, TextMetrics
from popcompile.package.manifest import Manifest


@dataclass(frozen=True)
class PromptScores:
    """One prompt's comparison with the full model. KL(full || other) in nats: of the first token after the prompt, and
    the mean of the continuation's others, if it has any. nll: mean negative log-likelihood of the continuation's tokens
    in nats, agreement: share of its predictions whose most likely token is the full model's.

    greedy: tokens until the two greedy continuations differ, where it was measured.
    """

    first_kl: float
    later_kl: float | None
    agreement: float
    full_nll: float
    nll: float
    greedy: int | None = None

    @classmethod
    def of(cls, full: Tensor, other: Tensor, continuation: Tensor) -> PromptScores:
        """Of two predictions [tokens, vocabulary] of `continuation` [tokens]."""
        compared = compare(full, other, continuation)
        return cls(
            first_kl=float(compared.kl[0]),
            later_kl=float(compared.kl[1:].mean()) if len(continuation) > 1 else None,
            agreement=float(compared.agreement.mean()),
            full_nll=float(compared.full_nll.mean()),
            nll=float(compared.nll.mean()),
        )


def compared_with_itself(scores: PromptScores) -> PromptScores:
    """The full model compared with itself."""
    return replace(scores, first_kl=0, later_kl=scores.later_kl and 0.0, agreement=1, nll=scores.full_nll, greedy=None)


def comparison(
    folder: str | Path,
    manifest: Manifest,
    reference: str | Path | None,
    settings: dict[str, Any],
    scores: Mapping[str, Mapping[str, list[PromptScores]]],
    seed: int,
) -> Evaluation:
    """What evaluations report of the package and of its variants. scores: by variant and text, "pop" the package's."""
    metrics = {variant: summaries(by_text, seed) for variant, by_text in scores.items()}
    result: Evaluation = {
        "package": str(folder),
        "reference": None if reference is None else str(reference),
        "pruned": manifest.pruned,
        "kv_projection": manifest.kv_projection,
        "settings": settings,
        "texts": metrics.pop("pop"),
    }
    if metrics:
        unpruned = {name: [compared_with_itself(s) for s in found] for name, found in scores["pop"].items()}
        result["baselines"] = {"none": summaries(unpruned, seed), **metrics}
    return result


def summaries(by_text: Mapping[str, list[PromptScores]], seed: int) -> dict[str, TextMetrics]:
    """Metrics of every text and, of several, of all together."""
    found = {name: summarise(scores, seed) for name, scores in by_text.items()}
    if len(by_text) > 1:
        found["all"] = summarise([s for scores in by_text.values() for s in scores], seed)
    return found


def summarise(scores: Sequence[PromptScores], seed: int) -> TextMetrics:
    """The metrics of `evaluate` over prompts, and how many prompts they are of."""

    def over_prompts(statistic: Callable[[Any], Any], value: Callable[[PromptScores], float]) -> Estimate:
        return estimate(statistic, [value(s) for s in scores], seed)

    metrics: TextMetrics = {
        "prompts": len(scores),
        "first_token_kl_mean": over_prompts(_mean, lambda s: s.first_kl),
        "first_token_kl_p95": over_prompts(lambda x: np.quantile(x, 0.95, axis=-1), lambda s: s.first_kl),
        "top1_agreement": over_prompts(_mean, lambda s: s.agreement),
        "full_perplexity": over_prompts(_exp_mean, lambda s: s.full_nll),
        "pop_perplexity": over_prompts(_exp_mean, lambda s: s.nll),
        "perplexity_ratio": over_prompts(_exp_mean, lambda s: s.nll - s.full_nll),
    }
    later = [s.later_kl for s in scores if s.later_kl is not None]
    if later:
        metrics["continuation_kl_mean"] = estimate(_mean, later, seed)
    greedy = [float(s.greedy) for s in scores if s.greedy is not None]
    if greedy:
        metrics["greedy_agreement_tokens"] = _of(len(greedy), estimate(_mean, greedy, seed))
    assert all(math.isfinite(m["value"]) for m in metrics.values() if isinstance(m, dict))
    return metrics


def retrieval_summary(
    asked: Sequence[Question], answered: Sequence[Mapping[str, bool]], seed: int
) -> dict[str, AnswerShares]:
    """By kind of question: how many prompts, the shares that were answered, and what of the full model's is kept."""
    found: dict[str, AnswerShares] = {}
    for kind in KINDS:
        rows = [row for question, row in zip(asked, answered, strict=True) if question.kind == kind]
        if rows:
            found[kind] = answer_summary(rows, seed)
    return found


def answer_summary(answered: Sequence[Mapping[str, bool]], seed: int) -> AnswerShares:
    """Of questions, by encoder: how many there are, the shares that were answered, and what of the reference's is
    kept.
    """
    shares = {name: estimate(_mean, [float(row[name]) for row in answered], seed) for name in answered[0]}
    kept = [float(row["pop"]) for row in answered if row["reference"]]
    summary: AnswerShares = {"prompts": len(answered), "answered": shares}
    if kept:
        summary["kept"] = _of(len(kept), estimate(_mean, kept, seed))
    return summary


def code_summary(solved: Mapping[str, list[float]], seed: int) -> CodeShares:
    """Shares of the problems that each encoder solved (1 or 0 each), and what pop's differs by from the reference's."""
    difference = [pop - full for pop, full in zip(solved["pop"], solved["reference"], strict=True)]
    return {
        "problems": len(difference),
        "pass_at_1": {name: estimate(_mean, found, seed) for name, found in solved.items()},
        "difference": estimate(_mean, difference, seed),
    }


def _of(prompts: int, estimated: Estimate) -> Estimate:
    estimated["prompts"] = prompts
    return estimated


def _mean(samples: Any) -> Any:
    return samples.mean(-1)


def _exp_mean(samples: Any) -> Any:
    return np.exp(samples.mean(-1))
