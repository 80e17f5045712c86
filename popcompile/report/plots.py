"""Pictures of what was measured, drawn by matplotlib: SVG and PNG files, and SVG to stand in a page.

The same numbers give the same bytes. Lines differ in marker, stroke and colour, so they can be told apart in print and
by color-blind readers (the palette is Okabe and Ito's).
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popcompile.errors import PopcompileError
from popcompile.package.benchmark import Benchmark
from popcompile.report.bench import prompt_tokens
from popcompile.report.output_file import replace_file, require_replaceable_file
from popcompile.terminal import printable

if TYPE_CHECKING:  # importing matplotlib takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from popcompile.package.measurements import LayerChoice, Point
    from popcompile.package.report import Importance

_FORMATS = (".svg", ".png")
_STAGES: dict[str, dict[str, Any]] = {
    "prefill": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "decode": {"color": "#D55E00", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
}
_NAMES = {"mlp": "the MLP"}


def require_plot_path(path: Path) -> None:
    """Check, before any work, that a plot can be written at `path`. Raises PopcompileError."""
    if path.suffix.lower() not in _FORMATS:
        raise PopcompileError(f"--plot {path}: unknown format; end the name in {' or '.join(_FORMATS)}")
    require_replaceable_file("--plot", path)


def write_importance_plot(
    path: Path, importance: Importance, title: str = "", pruned: Collection[int] | None = None
) -> None:
    """Plot both stages over the layers into a .svg or .png file. Raises PopcompileError where it cannot be written."""
    replace_file("--plot", path, _draw(importance, title, pruned, path.suffix.lower().removeprefix(".")))


def importance_svg(importance: Importance, pruned: Collection[int] | None = None, title: str = "") -> str:
    """The plot as an <svg> element for an HTML page; layers of `pruned` are shaded."""
    return _element(_draw(importance, title, pruned, "svg"))


def _draw(importance: Importance, title: str, pruned: Collection[int] | None, kind: str) -> bytes:
    height = 4 if not importance.blocks else 3 * len(importance.blocks)
    return _picture(height, lambda figure: _fill(figure, importance, title, set(pruned or ())), kind)


def _picture(height: float, fill: Callable[[Figure], None], kind: str = "svg") -> bytes:
    """A figure, 8 inches wide, that `fill` draws into, as a file of `kind`."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports where it keeps its font cache
    import matplotlib.style
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "popcompile", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.style.context(["default", settings]):
        figure = Figure(figsize=(8, height), layout="constrained")
        fill(figure)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _plain(name: str) -> str:
    """A name as it is, where matplotlib would read mathematics between dollars, and leave out of the legend what begins
    with an underscore, and SVG has no place for control characters.
    """
    shown = printable(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _element(file: bytes) -> str:
    """The <svg> element of an SVG file."""
    text = file.decode()
    return text[text.index("<svg") :]


def _fill(figure: Figure, importance: Importance, title: str, pruned: set[int]) -> None:
    """One pair of axes per block, below each other."""
    blocks = importance.blocks or ("",)
    all_axes = figure.subplots(len(blocks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    values = [v for v in (*importance.prefill, *importance.decode) if v > 0]
    floor = 10 ** _exponent(min(values, default=1.0)) / 3  # where exact zeros stand, below everything else
    for i, (axes, block) in enumerate(zip(all_axes, blocks, strict=True)):
        pick = slice(i, None, len(blocks))
        _stages(axes, importance, pick, floor)
        _shade(axes, pruned)
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor / 2)
        axes.set_ylabel(f"importance of {_NAMES.get(block, block)}" if block else "importance")
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_title(_plain(title) or "Importance by stage", loc="left")
    figure.legend(*_entries(all_axes), frameon=False, ncols=4, loc="outside lower center")
    all_axes[-1].set_xlim(-0.5, len(importance.prefill) // len(blocks) - 0.5)
    all_axes[-1].set_xlabel("layer")
    all_axes[-1].xaxis.get_major_locator().set_params(integer=True)


def _shade(axes: Axes, pruned: Collection[int]) -> None:
    for layer in sorted(pruned):
        label = "pruned in prefill" if layer == min(pruned) else None
        axes.axvspan(layer - 0.5, layer + 0.5, facecolor="0.88", edgecolor="none", zorder=0, label=label)


def _entries(all_axes: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of the legend, each label once, stages first."""
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: (label not in _STAGES, *[s not in label for s in _STAGES]))
    return [entries[label] for label in labels], labels


def _stages(axes: Axes, importance: Importance, pick: slice, floor: float) -> None:
    for stage, style in _STAGES.items():
        means, errors = getattr(importance, stage)[pick], getattr(importance, f"{stage}_error")[pick]
        shown = [(i, mean, error) for i, (mean, error) in enumerate(zip(means, errors, strict=True)) if mean > 0]
        if shown:
            layers, heights, bars = zip(*shown, strict=True)
            low = [min(bar, 0.9 * height) for height, bar in zip(heights, bars, strict=True)]  # a log axis ends above 0
            axes.errorbar(layers, heights, yerr=(low, bars), label=stage, markersize=5, elinewidth=0.8, **style)
        if zeros := [i for i, mean in enumerate(means) if mean == 0]:
            cross = {"color": style["color"], "markersize": 8, "markeredgewidth": 2}
            axes.plot(zeros, [floor] * len(zeros), "x", label=f"{stage}: exactly 0", **cross)


def _exponent(value: float) -> int:
    """The power of ten at or below a number."""
    return math.floor(math.log10(value))


# --- frontier --------------------------------------------------------------------------------------------------


def frontier_svg(choice: LayerChoice) -> str:
    """What every measured set of pruned layers costs, over the number of its layers, as an <svg> element.

    Above, KL of the first token, of those after it or of answers that stand in the prompt, whichever is most, with its
    standard error where it is known; below, perplexity over the whole model's.
    """
    return _element(_picture(5.5, lambda figure: _fill_frontier(figure, choice)))


def _fill_frontier(figure: Figure, choice: LayerChoice) -> None:
    all_axes = figure.subplots(2, 1, sharex=True)
    best = choice.best()
    for axes, metric in zip(all_axes, ("worst_kl", "worst_ppl_ratio"), strict=True):
        _points(axes, choice.frontier, metric, "measured set", color="0.6", marker=".", linestyle="none")
        _points(axes, best, metric, "best of its number", **_STAGES["prefill"] | {"markersize": 4})
        chosen = {"color": "#D55E00", "marker": "*", "markersize": 14, "linestyle": "none", "zorder": 3}
        picked = [p for p in choice.frontier if p.chosen]
        label = f"chosen, window {picked[0].window}" if picked else "chosen"
        _points(axes, picked, metric, label, **chosen)
        if (limit := choice.max_kl if metric == "worst_kl" else choice.max_ppl_ratio) is not None:
            axes.axhline(limit, color="#009E73", linestyle=":", label="budget")
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _scale_kl(all_axes[0], choice)
    _scale_perplexity(all_axes[1], choice)
    shown = _apart([*(p for p in choice.frontier if p.chosen), *best])
    all_axes[-1].set_xticks([len(p.pruned) for p in shown], [f"{len(p.pruned)}\n{p.speedup:.2f}x" for p in shown])
    all_axes[-1].set_xlabel(
        f"pruned layers; below, how many times fewer FLOPs a prompt of {choice.prompt_tokens} tokens takes"
    )
    figure.legend(*_entries(all_axes), frameon=False, ncols=4, loc="outside lower center")


def _scale_kl(axes: Axes, choice: LayerChoice) -> None:
    """Logarithmic where the values are far apart."""
    axes.set_ylabel("KL (nats), the worst of three")
    values = [p.loss.worst_kl for p in choice.frontier if 0 < p.loss.worst_kl < math.inf]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)


def _scale_perplexity(axes: Axes, choice: LayerChoice) -> None:
    """From 1 to five times what the budget allows or the choice costs: far costlier sets would flatten all others."""
    axes.set_ylabel("perplexity, pop / full")
    points = [p for p in choice.frontier if math.isfinite(p.loss.worst_ppl_ratio)]
    values = [p.loss.worst_ppl_ratio for p in points]
    of_interest = [p.loss.worst_ppl_ratio for p in points if p.chosen]
    if choice.max_ppl_ratio is not None:
        of_interest.append(choice.max_ppl_ratio)
    if values:
        bottom = min(1.0, *values, *of_interest)
        excess = max([0.01, *(value - 1 for value in of_interest)]) if of_interest else max(values) - 1
        axes.set_ylim(bottom, max(1 + min(5 * excess, 1.05 * (max([*values, *of_interest]) - 1)), bottom + 0.01))


def _apart(points: Sequence[Point]) -> list[Point]:
    """Those whose labels do not overlap on the axis; of two that would, the earlier one."""
    counts = [len(p.pruned) for p in points]
    gap = (max(counts, default=0) - min(counts, default=0)) / 11
    shown: list[Point] = []
    for point in points:
        if all(abs(len(point.pruned) - len(other.pruned)) >= gap for other in shown):
            shown.append(point)
    return shown


def _points(axes: Axes, points: Sequence[Point], metric: str, label: str, **style: Any) -> None:
    """Points with finite losses; KL with its error, where it is known."""
    shown = [p for p in points if math.isfinite(getattr(p.loss, metric))]
    heights = [getattr(p.loss, metric) for p in shown]
    errors = None
    if metric == "worst_kl" and style["linestyle"] == "-":
        known = [0.0 if math.isnan(p.loss.worst_kl_error) else p.loss.worst_kl_error for p in shown]
        errors = ([min(e, 0.9 * h) for e, h in zip(known, heights, strict=True)], known)  # a log axis ends above 0
    if shown:
        counts = [len(p.pruned) for p in shown]
        axes.errorbar(counts, heights, yerr=errors, label=label, elinewidth=0.8, capsize=3, **style)


# --- FLOPs -----------------------------------------------------------------------------------------------------


def flops_svg(layers: Sequence[Mapping[str, Any]], tokens: int) -> str:
    """FLOPs of every layer in a prefill of `tokens` tokens, of the full model and of the package, as an <svg> element.

    layers: rows of `layer_table`; pruned ones are shaded.
    """
    return _element(_picture(3.2, lambda figure: _fill_flops(figure, layers, tokens)))


def _fill_flops(figure: Figure, layers: Sequence[Mapping[str, Any]], tokens: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    _shade(axes, [row["layer"] for row in layers if row["pruned"]])
    numbers = [row["layer"] for row in layers]
    full, pop = ([row[name] / 1e9 for row in layers] for name in ("full_prefill_flops", "prefill_flops"))
    axes.bar(numbers, full, width=0.8, facecolor="none", edgecolor="0.45", label="full prefill")
    axes.bar(numbers, pop, width=0.5, color=_STAGES["prefill"]["color"], label="pop prefill")
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"GFLOPs, {tokens:,} tokens")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*_entries([axes]), frameon=False, ncols=4, loc="outside lower center")


# --- benchmark -------------------------------------------------------------------------------------------------

_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":", "markerfacecolor": "white"},
    {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": "#000000", "marker": "x", "linestyle": ":"},
)


def write_prefill_plot(path: Path, result: Benchmark) -> None:
    """Plot the medians of `bench.bench` over the prompts' lengths into a .svg or .png file, a line for each subject,
    with bars from the fastest turn to the slowest. Raises PopcompileError where it cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    replace_file("--plot", path, _picture(4.5, lambda figure: _fill_prefill(figure, result), kind))


def prefill_svg(result: Benchmark) -> str:
    """The same plot as an <svg> element for an HTML page."""
    return _element(_picture(4.5, lambda figure: _fill_prefill(figure, result)))


def _fill_prefill(figure: Figure, result: Benchmark) -> None:
    axes = figure.subplots()
    for index, subject in enumerate(result["subjects"]):
        rows = sorted(subject["lengths"], key=lambda row: row["tokens"])
        medians = [row["prefill"]["median"] * 1e3 for row in rows]
        turns = [[second * 1e3 for second in row["prefill"]["seconds"]] for row in rows]
        low = [median - min(times) for median, times in zip(medians, turns, strict=True)]
        high = [max(times) - median for median, times in zip(medians, turns, strict=True)]
        style = _LINES[index % len(_LINES)]
        label = _plain(subject["name"])
        tokens = [prompt_tokens(result, row["tokens"]) for row in rows]
        axes.errorbar(tokens, medians, yerr=(low, high), label=label, markersize=5, elinewidth=0.8, capsize=3, **style)
    model = str(result["source"]).rstrip("/").rpartition("/")[2]  # of a path, of a hub id
    axes.set_title(_plain(f"Prefill, {model}, {result['dtype']}"), loc="left")
    axes.set_xlabel("prompt (tokens)")
    axes.set_ylabel("prefill (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*_entries([axes]), frameon=False, ncols=2, loc="outside lower center")
