"""What a package's report says of the choice of its layers and of quality: written, and read and checked.

Every part may be missing, for a package need not be measured. One of another shape than ours raises KeyError,
TypeError, ValueError or AttributeError, which `inspection.readable_report` words for the user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from popcompile.package.benchmark import Benchmark
from popcompile.package.evaluation import Evaluation
from popcompile.package.report import REFERENCE_TOKENS, Importance, Loss

if TYPE_CHECKING:
    from popcompile.package.manifest import Manifest

_LOSSES = tuple(field.name for field in fields(Loss))
_OPTIONAL = (
    "first_token_kl_error",
    "retrieval_found",
    "retrieval_kl",
    "retrieval_kept",
    "retrieval_kl_error",
    "at_least",
    "images",
)


@dataclass(frozen=True)
class Point:
    """A measured set of pruned layers. speedup: prefill FLOPs of the whole model with one row of logits, by those of
    this prefill. refined: with maps refined by gradients, and not only in closed form. window: tokens at a prompt's end
    that take the whole model.
    """

    pruned: list[int]
    window: int
    speedup: float
    loss: Loss
    refined: bool
    chosen: bool


@dataclass(frozen=True)
class LayerChoice:
    """How the pruned layers were chosen. how: "auto" (as many as the budget allows), or "count" or "layers", which the
    user gave.

    max_kl in nats and max_ppl_ratio are the budget, None where it has none; met: whether the choice is within it.
    prompt_tokens: the length of prompts that speedups are of. frontier: every set that was measured; of one number of
    layers there may be several.
    """

    how: str
    max_kl: float | None
    max_ppl_ratio: float | None
    met: bool
    prompt_tokens: int
    frontier: list[Point]

    def to_json(self) -> dict[str, Any]:
        """As `read_measurements` reads it."""
        budget = {"max_kl": self.max_kl, "max_ppl_ratio": self.max_ppl_ratio}
        return {
            "how": self.how,
            "budget": budget if self.how == "auto" else None,
            "met": self.met,
            "prompt_tokens": self.prompt_tokens,
            "frontier": [asdict(point) for point in self.frontier],
        }

    def best(self) -> list[Point]:
        """The set of least KL for each number of layers, ascending."""
        least: dict[int, Point] = {}
        for point in sorted(self.frontier, key=lambda p: (p.loss.is_bound, p.loss.worst_kl)):
            least.setdefault(len(point.pruned), point)
        return [least[count] for count in sorted(least)]

    def shown(self) -> list[Point]:
        """These, and the chosen one, in order."""
        points = self.best()
        points += [p for p in self.frontier if p.chosen and p not in points]
        return sorted(points, key=lambda p: (len(p.pruned), p.loss.worst_kl))


@dataclass(frozen=True)
class Quality:
    """The package's loss on text that calibration did not see; own_projection: that of the same layers with their own
    K/V projections, None where the package has those. Lengths are in tokens; asked_tokens: of the prompts in which
    answers stand, None where there are none. images: which prompts with images it was measured on as well, None for
    text alone.
    """

    text: str
    texts: int
    prompt_tokens: int
    asked_tokens: int | None
    window: int
    continuation_tokens: int
    loss: Loss
    own_projection: Loss | None
    images: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As `read_measurements` reads it."""
        return asdict(self)


@dataclass(frozen=True)
class MeasuredImportance:
    """Importance by layer, and how many texts of how many tokens it was measured on."""

    texts: int
    tokens: int
    importance: Importance


@dataclass(frozen=True)
class Measurements:
    """None: not measured. evaluation, evaluation_tasks: what `popcompile evaluate --save` kept; benchmark: what
    `popcompile bench --save` did. evaluation_images, benchmark_images: of prompts with images.
    """

    importance: MeasuredImportance | None
    choice: LayerChoice | None
    quality: Quality | None
    evaluation: Evaluation | None
    evaluation_images: Evaluation | None
    evaluation_tasks: dict[str, Any] | None
    benchmark: Benchmark | None
    benchmark_images: Benchmark | None


def read_measurements(report: Mapping[str, Any], manifest: Manifest) -> Measurements:
    """The measurements in a package's report.json."""

    def part(name: str, read: Any) -> Any:
        return None if report.get(name) is None else read(_object(name, report[name]))

    count = manifest.num_layers
    return Measurements(
        importance=part("importance", lambda entry: _importance(entry, count)),
        choice=part("choice", lambda entry: _choice(entry, count, manifest.window)),
        quality=part("quality", lambda entry: _quality(entry, manifest.kv_projection)),
        evaluation=part("evaluation", dict),
        evaluation_images=part("evaluation_images", dict),
        evaluation_tasks=part("evaluation_tasks", dict),
        benchmark=part("benchmark", dict),
        benchmark_images=part("benchmark_images", dict),
    )


def _importance(entry: dict[str, Any], num_layers: int) -> MeasuredImportance:
    rows = entry["layers"]
    if [row["layer"] for row in rows] != list(range(num_layers)):
        raise ValueError(f"importance has other layers than 0 to {num_layers - 1}")
    prefill, decode = ([_number(row[stage]) for row in rows] for stage in ("prefill", "decode"))
    prefill_error, decode_error = (
        [_number_or_unknown(row[f"{stage}_error"]) for row in rows] for stage in ("prefill", "decode")
    )
    found = Importance(prefill, decode, prefill_error, decode_error)
    return MeasuredImportance(_whole(entry["texts"]), _whole(entry["tokens"]), found)


def _choice(entry: dict[str, Any], num_layers: int, window: int) -> LayerChoice:
    """window: the package's, for points that name none: it was not chosen then."""
    if entry["how"] not in ("auto", "count", "layers"):
        raise ValueError(f"unknown choice {entry['how']!r}")
    budget = entry["budget"] or {"max_kl": None, "max_ppl_ratio": None}
    points = []
    for point in entry["frontier"]:
        if not set(point["pruned"]) <= set(range(num_layers)):
            raise ValueError(f"the frontier prunes {point['pruned']} of {num_layers} layers")
        points.append(
            Point(
                pruned=point["pruned"],
                window=_whole(point.get("window", window)),
                speedup=_number(point["speedup"]),
                loss=read_loss(point["loss"]),
                refined=bool(point.get("refined", False)),
                chosen=bool(point["chosen"]),
            )
        )
    return LayerChoice(
        how=entry["how"],
        max_kl=_number_or_none(budget["max_kl"]),
        max_ppl_ratio=_number_or_none(budget["max_ppl_ratio"]),
        met=bool(entry["met"]),
        prompt_tokens=_whole(entry.get("prompt_tokens", REFERENCE_TOKENS)),
        frontier=points,
    )


def _quality(entry: dict[str, Any], kv_projection: str) -> Quality:
    own = entry.get("own_projection")
    other = None if own is None or kv_projection == "layer" else read_loss(own)
    return Quality(
        text=str(entry["text"]),
        texts=_whole(entry["texts"]),
        prompt_tokens=_whole(entry["prompt_tokens"]),
        asked_tokens=None if (asked := entry.get("asked_tokens")) is None else _whole(asked),
        window=_whole(entry.get("window", 1)),  # reports of format version 2 have none
        continuation_tokens=_whole(entry["continuation_tokens"]),
        loss=read_loss(entry["loss"]),
        own_projection=other,
        images=None if (images := entry.get("images")) is None else str(images),
    )


def read_loss(entry: dict[str, Any]) -> Loss:
    """Of what `asdict` makes of one."""
    images = entry.get("images")
    return replace(_loss_of_kind(entry), images=None if images is None else _loss_of_kind(images))


def _loss_of_kind(entry: dict[str, Any]) -> Loss:
    values: dict[str, Any] = {name: _number(entry[name]) for name in _LOSSES if name not in _OPTIONAL}
    return Loss(
        **values,
        first_token_kl_error=_number_or_unknown(entry["first_token_kl_error"]),
        retrieval_found=_number_or_none(entry.get("retrieval_found")),
        retrieval_kl=_number_or_none(entry.get("retrieval_kl")),
        retrieval_kept=_number_or_none(entry.get("retrieval_kept")),
        retrieval_kl_error=_number_or_none(entry.get("retrieval_kl_error")),
        at_least=bool(entry.get("at_least", False)),
    )


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is no object")
    return value


def _number(value: Any) -> float:
    """Infinity is one: a model without its layers has any perplexity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number_or_unknown(value: Any) -> float:
    """The standard error over a single text is null, or NaN."""
    unknown = value is None or (isinstance(value, float) and math.isnan(value))
    return math.nan if unknown else _number(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value
