"""Measure what pruning costs: a package's pruned prefill against the full model that the same package holds.

Or another package of the same model: fp32's full model against int4's pruned prefill shows what both changes cost.

Every prompt is encoded twice, by prefill.onnx and by decode.onnx, which is the full model for any number of tokens.
Both caches are then continued with the text's own next tokens by decode.onnx (teacher forcing), so that each of them
is predicted once by the full model and once by the full model over a pruned prompt.

    prompt       | x0 x1 ... boundary |              prefill: pop or full
    continuation                      | y1 y2 ... yC  decode, predictions of y1 (by the boundary token) to yC
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.evaluation.code_problems import Problem, complete, passes, read_problems, require_room
from popcompile.evaluation.encoders import Encoders, open_encoders, require_comparable, require_vocabulary
from popcompile.evaluation.questions import Question, is_answered, questions
from popcompile.evaluation.settings import EvaluationSettings
from popcompile.evaluation.summaries import (
    PromptScores,
    code_summary,
    comparison,
    retrieval_summary,
)
from popcompile.package.configs import load_tokenizer
from popcompile.package.evaluation import CodeShares, Evaluation
from popcompile.package.manifest import read_manifest
from popcompile.progress import Progress
from popcompile.runtime.cache import KVCache
from popcompile.runtime.encoder import Encoder
from popcompile.runtime.providers import find_provider
from popcompile.text.documents import default_texts, read_texts, windows


def evaluate(
    folder: str | Path,
    text: Sequence[Path] | None = None,
    prompts: int = 32,
    prompt_tokens: int = 256,
    continuation_tokens: int = 64,
    seed: int = 0,
    provider: str = "cpu",
    baselines: bool = False,
    progress: Progress | None = None,
    *,
    greedy_prompts: int = 8,
    greedy_tokens: int = 32,
    retrieval_prompts: int = 20,
    reference: str | Path | None = None,
    run_code: bool = False,
    code_problems: int | None = None,
) -> Evaluation:
    """Compare the package's pruned prefill with its full model on windows of text, and on facts to find in a prompt.

    text: files to take `prompts` windows from each (texts.read_texts); default: texts.default_texts. Lengths are in
    tokens. greedy_prompts: of how many prompts, the first ones, greedy continuations of up to greedy_tokens are
    compared; 0 for none. retrieval_prompts: of each kind (questions.py), also of prompt_tokens tokens, with
    passages of the first text; 0 for none. baselines: measure variants of the package on the same windows and
    questions too, which compiles them.
    reference: a package whose full model is compared with, in place of this one's, which becomes a baseline, "full".
    run_code: complete HumanEval's problems and run what the model wrote (code_problems.py), code_problems of them, all
    by default.

    Returns what package/evaluation.py says.
    Raises PopcompileError.
    """
    started = time.perf_counter()
    if code_problems is not None and not run_code:
        raise PopcompileError("--code-problems is for --run-code, which runs what a model wrote; give both, or neither")
    problems = read_problems(code_problems) if run_code else []
    settings = EvaluationSettings(
        prompts=prompts, prompt_tokens=prompt_tokens, continuation_tokens=continuation_tokens,
        greedy_prompts=greedy_prompts, greedy_tokens=greedy_tokens, retrieval_prompts=retrieval_prompts, seed=seed,
        provider=provider,
    )  # fmt: skip
    settings.require()
    documents = require_options(text or (), provider) or default_texts()
    manifest = read_manifest(Path(folder))
    settings.require_fit(manifest)
    other = None if reference is None else Path(reference)
    require_comparable(Path(folder), manifest, other, baselines)
    greedy_tokens = min(greedy_tokens, manifest.context_length - prompt_tokens)
    settings = replace(settings, greedy_tokens=greedy_tokens)
    report = progress or (lambda *_: None)

    tokenizer = load_tokenizer(Path(folder), manifest)
    if problems:
        require_room(problems, tokenizer, manifest.context_length)
    samples = {
        name: windows(tokenizer, texts, prompts, prompt_tokens + continuation_tokens, seed, name)
        for name, texts in documents.items()
    }
    asked = questions(tokenizer, next(iter(documents.values())), retrieval_prompts, prompt_tokens, seed)
    tokens_used = [t for found in samples.values() for t in found] + [t for q in asked for t in (q.prompt, q.answer)]
    require_vocabulary(Path(folder), manifest, tokens_used)
    scores: dict[str, dict[str, list[PromptScores]]] = {}
    answered: list[dict[str, bool]] = []
    with open_encoders(
        Path(folder), manifest, provider, reference=other, baselines=baselines, progress=report
    ) as encoders:
        total, done = sum(len(w) for w in samples.values()) + len(asked), 0
        for name, tokens in samples.items():
            for index, window in enumerate(tokens):
                report("evaluate", done, total)
                steps = greedy_tokens if index < greedy_prompts else 0
                compared = _compare(encoders, window[:prompt_tokens], window[prompt_tokens:], steps)
                for variant, found in compared.items():
                    scores.setdefault(variant, {}).setdefault(name, []).append(found)
                done += 1
        for question in asked:
            report("evaluate", done + len(answered), total)
            answered.append({name: _answers(encoder, question) for name, encoder in encoders.by_name.items()})
        code = _code(encoders.by_name, tokenizer, problems, seed, report) if problems else None
        report("evaluate", total, total)

    result = comparison(folder, manifest, reference, settings.to_json(), scores, seed)
    result["retrieval"] = retrieval_summary(asked, answered, seed)
    if code is not None:
        result["code"] = code
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


# --- what is measured ------------------------------------------------------------------------------------------


def require_options(text: Sequence[Path], provider: str) -> dict[str, list[str]]:
    """Check what is known before a package is looked at; returns the documents of the text files by their names.

    Raises PopcompileError.
    """
    find_provider(provider)
    return {str(path): read_texts(path) for path in text}


def _compare(encoders: Encoders, prompt: Tensor, continuation: Tensor, greedy_tokens: int) -> dict[str, PromptScores]:
    """Scores of one prompt by encoder; greedy agreement of "pop" only, up to `greedy_tokens`."""
    full = encoders.full
    expected_first, expected_cache = full.encode(prompt)
    branch = copy.deepcopy(expected_cache) if greedy_tokens else None
    expected = full.predict(expected_first, expected_cache, continuation)
    found = {}
    for name, encoder in encoders.compared.items():
        first, cache = encoder.encode(prompt)
        greedy = None
        if name == "pop" and branch is not None:
            pop_branch = copy.deepcopy(cache)
            greedy = _greedy_agreement((full, expected_first, branch), (encoder, first, pop_branch), greedy_tokens)
        scores = PromptScores.of(expected, encoder.predict(first, cache, continuation), continuation)
        found[name] = replace(scores, greedy=greedy)
    return found


def _greedy_agreement(one: tuple[Encoder, Tensor, KVCache], other: tuple[Encoder, Tensor, KVCache], limit: int) -> int:
    """Tokens, at most `limit`, until two greedy continuations differ. Logits are the boundary token's [1, vocabulary];
    both caches grow.
    """
    states = [one, other]
    for agreed in range(limit):
        tokens = [int(logits[0].argmax()) for _, logits, _ in states]
        if tokens[0] != tokens[1]:
            return agreed
        if agreed + 1 < limit:
            next_token = torch.tensor(tokens[:1])
            states = [(e, e.runtime.feed([next_token], cache, "decode")[0], cache) for e, _, cache in states]
    return limit


def _answers(encoder: Encoder, question: Question) -> bool:
    first, cache = encoder.encode(question.prompt)
    return is_answered(encoder.predict(first, cache, question.answer), question.answer)


def _code(
    encoders: Mapping[str, Encoder],
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    seed: int,
    progress: Progress,
) -> CodeShares:
    """pass@1 by encoder, and what pop's differs by from the reference's."""
    solved: dict[str, list[float]] = {}
    names = [name for name in encoders if name != "dropped"]
    for index, name in enumerate(names):

        def written(count: int, before: int = index * len(problems)) -> None:
            progress("code", before + count, len(names) * len(problems))

        written(0)
        completions = complete(encoders[name], tokenizer, problems, written)
        solved[name] = [float(passes(p, c)) for p, c in zip(problems, completions, strict=True)]
    return code_summary(solved, seed)
