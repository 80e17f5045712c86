"""What an evaluation's JSON holds: `evaluate` returns it, --json prints it, and with --save a package's report has it.

Numbers over prompts are estimates with a 95% confidence interval.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Estimate(TypedDict):
    """low, high: None of one prompt. prompts: how many it is of, where that is not said beside it."""

    value: float
    low: float | None
    high: float | None
    prompts: NotRequired[int]


#: those of TextMetrics
Metric = Literal[
    "first_token_kl_mean",
    "first_token_kl_p95",
    "continuation_kl_mean",
    "top1_agreement",
    "full_perplexity",
    "pop_perplexity",
    "perplexity_ratio",
    "greedy_agreement_tokens",
]


class TextMetrics(TypedDict):
    """Of `prompts` prompts, against the full model:

    first_token_kl_mean, first_token_kl_p95   KL(full || pop) of the first new token, nats
    continuation_kl_mean                      the same over the continuation's tokens after the first, if any
    top1_agreement                            share of predictions with the same most likely token
    full_perplexity, pop_perplexity           of the continuation
    perplexity_ratio                          pop / full, paired by prompt
    greedy_agreement_tokens                   tokens until the greedy continuations differ (EOS is one of them)
    """

    prompts: int
    first_token_kl_mean: Estimate
    first_token_kl_p95: Estimate
    continuation_kl_mean: NotRequired[Estimate]
    top1_agreement: Estimate
    full_perplexity: Estimate
    pop_perplexity: Estimate
    perplexity_ratio: Estimate
    greedy_agreement_tokens: NotRequired[Estimate]


class AnswerShares(TypedDict):
    """answered: by encoder the share of questions that it answers: "reference", the full model that is compared with,
    "pop" and the baselines. kept: the share of those answered by the reference that pop answers too.
    """

    prompts: int
    answered: dict[str, Estimate]
    kept: NotRequired[Estimate]


class CodeShares(TypedDict):
    """pass_at_1: by encoder, but for "dropped", which writes no code. difference: pop's less the reference's, paired by
    problem.
    """

    problems: int
    pass_at_1: dict[str, Estimate]
    difference: Estimate


class Evaluation(TypedDict):
    """settings: of evaluation/settings.py, or of pictures.py. texts: metrics by text; of several, "all" is their union
    and the last.

    baselines: metrics by variant and text: "none" (nothing pruned: the full model), "dropped" (the pruned layers
    dropped in prefill and decode) and, unless the package has it, "layer" (pruned with the layers' own K/V
    projection); "full" with a reference. retrieval: by kind of question, empty where the model's tokenizer or the
    length does not allow such prompts. code: with run_code.

    Of questions about pictures: how many pictures there are, the tokens of every prompt and those of its picture, and,
    where answers are given, the share that is answered exactly.
    """

    package: str
    reference: NotRequired[str | None]
    pruned: list[int]
    kv_projection: str
    settings: dict[str, Any]
    texts: dict[str, TextMetrics]
    baselines: NotRequired[dict[str, dict[str, TextMetrics]]]
    retrieval: NotRequired[dict[str, AnswerShares]]
    code: NotRequired[CodeShares]
    pictures: NotRequired[int]
    tokens: NotRequired[list[int]]
    image_tokens: NotRequired[list[int]]
    answers: NotRequired[AnswerShares]
    seconds: NotRequired[float]
