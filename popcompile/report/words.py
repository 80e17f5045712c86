"""Measurements in words and table cells, the same on the terminal and in the page."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from popcompile.package.manifest import Manifest
from popcompile.package.measurements import LayerChoice, Measurements, Quality
from popcompile.package.report import REFERENCE_IMAGE_TOKENS, Loss, format_layers


@dataclass(frozen=True)
class Table:
    """Cells as text. align: "l", "r", or "w" for text that wraps, for each column. marked: rows that stand out."""

    headers: list[str]
    rows: list[list[str]]
    align: str
    marked: set[int] = field(default_factory=set)


def unmeasured(folder: Path, manifest: Manifest, found: Measurements) -> dict[str, str]:
    """The command that measures it, for each of "quality", "time", "importance" and "frontier" that is not measured,
    and "image_time" and "image_quality" of a model that takes images.
    """
    out, source = shlex.quote(str(folder)), shlex.quote(str(manifest.source["name"]))
    if "text_decoder_of" in manifest.source:
        source += " --text-only"
    if adapter := manifest.source.get("adapter"):
        source += f" --adapter {shlex.quote(str(adapter))}"
    commands = {}
    if found.quality is None and found.evaluation is None:
        commands["quality"] = f"popcompile evaluate {out} --save"
    if found.benchmark is None:
        commands["time"] = f"popcompile bench {out} --save"
    if manifest.images is not None and found.evaluation_images is None:
        commands["image_quality"] = f"popcompile evaluate {out} --images DIR --save"
    if manifest.images is not None and found.benchmark_images is None:
        tokens = manifest.images.tokens_per_image or REFERENCE_IMAGE_TOKENS
        commands["image_time"] = f"popcompile bench {out} --image-tokens {tokens} --save"
    if found.importance is None:
        commands["importance"] = f"popcompile analyze {source}"
    if found.choice is None or not found.choice.frontier:
        commands["frontier"] = f"popcompile convert {source} {out} --prune auto --force"
    return commands


def not_measured(command: str) -> str:
    return f"not measured; `{command}` measures it"


def chosen_by(choice: LayerChoice | None) -> str:
    """Who chose the layers, and whether they keep to the budget."""
    if choice is None:
        return "not recorded"
    who = {"auto": "popcompile", "count": "popcompile; the user gave their number", "layers": "the user"}[choice.how]
    limits = [
        *([f"KL of at most {choice.max_kl:g} nats"] if choice.max_kl is not None else []),
        *([f"perplexity of at most {choice.max_ppl_ratio:g} times full"] if choice.max_ppl_ratio is not None else []),
    ]
    if not limits:
        return who
    return f"{who}; budget: {' and '.join(limits)}; {'met' if choice.met else 'not met'}"


def quality_words(quality: Quality) -> str:
    """The package's loss in one line."""
    images = "" if quality.loss.images is None else f"; prompts with images: {_loss_words(quality.loss.images)}"
    return _loss_words(quality.loss) + images


def _loss_words(loss: Loss) -> str:
    return (
        f"first-token KL {kl_cell(loss)} nats, agreement {share(loss.first_token_agreement)};"
        f" perplexity {ratio(loss.ppl_ratio)} times full{retrieval_words(loss)}"
    )


def retrieval_words(loss: Loss) -> str:
    """What becomes of answers that stand in the prompt, where that was measured."""
    if loss.retrieval_kl is None or loss.retrieval_kept is None:
        return ""
    kl = with_error(loss.retrieval_kl, loss.retrieval_kl_error)
    return f"; answers found in the prompt: KL {kl}, {share(loss.retrieval_kept)} kept"


def text_words(quality: Quality) -> str:
    """What quality was measured on."""
    lengths = f"{quality.prompt_tokens} tokens and {quality.continuation_tokens} after them"
    asked = "" if quality.asked_tokens is None else f"; answers in prompts of {quality.asked_tokens} tokens"
    images = "" if quality.images is None else f"; {quality.images}"
    return f"{quality.texts} texts, {quality.text}: prompts of {lengths}{asked}{images}"


def frontier_table(choice: LayerChoice) -> Table:
    """The best set for each number of layers, and the chosen one, which is marked."""
    points = choice.shown()
    with_images = any(p.loss.images is not None for p in points)
    rows = [
        [
            str(len(p.pruned)),
            format_layers(p.pruned),
            str(p.window),
            f"{p.speedup:.2f}x",
            *loss_cells(p.loss),
            *(_image_cells(p.loss) if with_images else []),
            ", ".join(word for word, true in (("refined", p.refined), ("chosen", p.chosen)) if true),
        ]
        for p in points
    ]
    marked = {i for i, p in enumerate(points) if p.chosen}
    saved = f"FLOPs saved, {choice.prompt_tokens} tokens"
    headers = ["number", "pruned layers", "window", saved, *LOSS_HEADERS, *(_IMAGE_HEADERS if with_images else []), ""]
    return Table(headers, rows, "rl" + "r" * (len(headers) - 3) + "l", marked)


LOSS_HEADERS = [
    "first-token KL",
    "same first token",
    "KL after it",
    "same token",
    "ppl / full",
    "KL of answers",
    "answers kept",
]


_IMAGE_HEADERS = ["images: first-token KL", "images: KL after it", "images: ppl / full", "images: KL of answers"]


def _image_cells(loss: Loss) -> list[str]:
    """Of prompts with images, where these were run."""
    if (images := loss.images) is None:
        return [""] * len(_IMAGE_HEADERS)
    return [kl_cell(images), small(images.kl), ratio(images.ppl_ratio), answers_cell(images)]


def loss_cells(loss: Loss) -> list[str]:
    shares = share(loss.first_token_agreement), share(loss.agreement)
    cells = [kl_cell(loss), shares[0], small(loss.kl), shares[1], ratio(loss.ppl_ratio)]
    return [*cells, answers_cell(loss), "" if loss.retrieval_kept is None else share(loss.retrieval_kept)]


def kl_cell(loss: Loss) -> str:
    return with_error(loss.first_token_kl, loss.first_token_kl_error)


def answers_cell(loss: Loss, error: bool = True) -> str:
    """The KL of answers; error: with its standard error, where that is known."""
    if loss.retrieval_kl is None:
        return ""
    known = with_error(loss.retrieval_kl, loss.retrieval_kl_error if error else None)
    return f"> {known}" if loss.at_least else known


def with_error(value: float, error: float | None) -> str:
    """A number of nats and its standard error, where that is known."""
    return small(value) + ("" if error is None or math.isnan(error) else f" ± {small(error)}")


def small(value: float) -> str:
    """A number of nats."""
    return f"{value:.4f}" if value < 1 else f"{value:.3g}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"
