"""An evaluation as a table on the terminal."""

from __future__ import annotations

from tabulate import tabulate

from popcompile.package.evaluation import AnswerShares, Estimate, Evaluation, Metric
from popcompile.package.report import format_layers
from popcompile.report.words import counted

_METRICS: dict[Metric, str] = {
    "first_token_kl_mean": "first token, KL mean (nats)",
    "first_token_kl_p95": "first token, KL 95th percentile",
    "continuation_kl_mean": "tokens after it, KL mean",
    "top1_agreement": "continuation, same top-1",
    "full_perplexity": "perplexity, full",
    "pop_perplexity": "perplexity, pop",
    "perplexity_ratio": "perplexity, pop / full",
    "greedy_agreement_tokens": "greedy tokens until they differ",
}
_COLUMNS: dict[Metric, str] = {
    "first_token_kl_mean": "KL mean",
    "first_token_kl_p95": "KL p95",
    "top1_agreement": "top-1",
    "pop_perplexity": "ppl",
    "perplexity_ratio": "ppl / full",
}
_VARIANTS = {
    "none": "nothing pruned",
    "full": "this package, nothing pruned",
    "dropped": "dropped in prefill and decode",
    "layer": "pruned, layers' own projection",
}


def evaluation_text(result: Evaluation) -> str:
    """The result of `evaluation.evaluate` for a terminal."""
    settings = result["settings"]
    prompts = ", ".join(f"{metrics['prompts']} of {name}" for name, metrics in result["texts"].items() if name != "all")
    lengths = f"prompts of {settings['prompt_tokens']} tokens and {settings['continuation_tokens']} after them"
    return _document(result, f"{prompts}: {lengths}")


def pictures_text(result: Evaluation) -> str:
    """The result of `evaluation.pictures.evaluate_pictures` for a terminal."""
    return _document(result, pictures_words(result))


def pictures_words(result: Evaluation) -> str:
    """Which questions about pictures an evaluation has asked."""
    (metrics,) = result["texts"].values()
    lengths = f"prompts of {_range(result['tokens'])} tokens, {_range(result['image_tokens'])} of them a picture's"
    return f"{counted(metrics['prompts'], 'question')} about {counted(result['pictures'], 'picture')}: {lengths}"


def _range(counts: list[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _document(result: Evaluation, prompts: str) -> str:
    """prompts: what was measured on, in words."""
    head = (
        f"{result['package']}: prefill skips {format_layers(result['pruned'])}, {result['kv_projection']} projection,"
        f" against {_reference(result)} full model\n{prompts}; [95% confidence interval]"
    )
    tables = [metric_rows(result)] + ([baseline_rows(result)] if "baselines" in result else [])
    tables += [retrieval_rows(result)] if result.get("retrieval") else []
    tables += [answer_rows(result)] if result.get("answers") else []
    tables += [code_rows(result)] if result.get("code") else []
    return "\n\n".join([head, *(tabulate(rows, headers, disable_numparse=True) for headers, rows in tables)])


def _reference(result: Evaluation) -> str:
    return "its" if result.get("reference") is None else f"{result['reference']}'s"


def evaluation_words(result: Evaluation) -> str:
    """The result in one line, of all its texts."""
    name = list(result["texts"])[-1]
    metrics = result["texts"][name]
    answers = "".join(
        f"; facts in a {kind}: {_cell(shares['pop'])} found, {_cell(shares['reference'])} by the full model"
        for kind, shares in ((kind, found["answered"]) for kind, found in result.get("retrieval", {}).items())
    )
    if "answers" in result:
        shares = result["answers"]["answered"]
        answers += f"; answered exactly: {_cell(shares['pop'])}, {_cell(shares['reference'])} by the full model"
    if "code" in result:
        shares = result["code"]["pass_at_1"]
        answers += f"; HumanEval pass@1: {_cell(shares['pop'])}, {_cell(shares['reference'])} of the full model"
    return (
        f"first-token KL {_cell(metrics['first_token_kl_mean'])} nats, agreement {_cell(metrics['top1_agreement'])};"
        f" perplexity {_cell(metrics['perplexity_ratio'])} times full (of {name}; 95% confidence interval){answers}"
    )


def metric_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per metric with a cell per text."""
    texts, rows = result["texts"], []
    for key, label in _METRICS.items():
        if all(key in metrics for metrics in texts.values()):
            if key == "greedy_agreement_tokens":
                label += f" (of {result['settings']['greedy_tokens']})"
            rows.append([label, *(_cell(metrics[key]) for metrics in texts.values())])
    return ["", *texts], rows


def baseline_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per text and variant of the package, itself the last; `result` has baselines."""
    package = {f"this package, {result['kv_projection']} projection": result["texts"]}
    variants = {_VARIANTS[name]: texts for name, texts in result["baselines"].items()} | package
    rows = []
    for name in result["texts"]:
        for variant, texts in variants.items():
            cells = [_number(texts[name][key]["value"]) for key in list(_COLUMNS)[:-1]]
            rows.append([name, variant, *cells, _cell(texts[name]["perplexity_ratio"])])
    return ["text", "variant", *_COLUMNS.values()], rows


def retrieval_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per kind of prompt and encoder, with the share that it answers; the package is the last."""
    rows = [row for kind, found in result["retrieval"].items() for row in _answered(result, kind, found)]
    return ["facts in the prompt", "prefill", "answered", "kept of the full model's"], rows


def answer_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per encoder, with the share of questions about pictures that it answers exactly."""
    rows = _answered(result, "questions", result["answers"])
    return ["about pictures", "prefill", "answered exactly", "kept of the full model's"], rows


def _answered(result: Evaluation, kind: str, found: AnswerShares) -> list[list[str]]:
    names = {"reference": f"{_reference(result)} full model", **_VARIANTS, "pop": "this package"}
    rows = []
    for name in (n for n in names if n in found["answered"]):
        kept = _cell(found["kept"]) if name == "pop" and "kept" in found else ""
        rows.append([f"{kind} ({found['prompts']})", names[name], _cell(found["answered"][name]), kept])
    return rows


def code_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per encoder with the share of HumanEval's problems that it solves; the package is the last."""
    names = {"reference": f"{_reference(result)} full model", **_VARIANTS, "pop": "this package"}
    code, rows = result["code"], []
    for name in (n for n in names if n in code["pass_at_1"]):
        difference = _cell(code["difference"]) if name == "pop" else ""
        rows.append([f"HumanEval ({code['problems']})", names[name], _cell(code["pass_at_1"][name]), difference])
    return ["code that is run", "prefill", "pass@1", "less the full model's"], rows


def _cell(metric: Estimate) -> str:
    low, high = metric["low"], metric["high"]
    interval = "" if low is None or high is None else f" [{_number(low)}, {_number(high)}]"
    return _number(metric["value"]) + interval


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.1e}"  # a model without its layers has any perplexity
