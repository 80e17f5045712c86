"""Pictures of what was measured, drawn by matplotlib: SVG and PNG files, and SVG to stand in a page.

The same numbers give the same bytes. Lines differ in marker, stroke and colour, so they can be told apart in print and
by color-blind readers (the palette is Okabe and Ito's).
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popcompile.errors import PopcompileError

if TYPE_CHECKING:  # importing matplotlib takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from popcompile.importance import Importance

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
    try:
        if not path.parent.is_dir():
            raise PopcompileError(f"--plot {path}: there is no folder {path.parent}; create it first")
        if path.exists() and path.is_dir():
            raise PopcompileError(f"--plot {path}: is a folder; give a file name")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PopcompileError(f"--plot {path}: no permission to write there; choose another place")
        path.lstat()
    except FileNotFoundError:
        pass  # a new file
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_importance_plot(
    path: Path, importance: Importance, title: str = "", pruned: Collection[int] | None = None
) -> None:
    """Plot both stages over the layers into a .svg or .png file. Raises PopcompileError where it cannot be written."""
    picture = _draw(importance, title, pruned, path.suffix.lower().removeprefix("."))
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> PopcompileError:
    return PopcompileError(f"--plot {path}: cannot be written ({error.strerror}); choose another place")


def importance_svg(importance: Importance, pruned: Collection[int] | None = None, title: str = "") -> str:
    """The plot as an <svg> element for an HTML page; layers of `pruned` are shaded."""
    text = _draw(importance, title, pruned, "svg").decode()
    return text[text.index("<svg") :]


def _draw(importance: Importance, title: str, pruned: Collection[int] | None, kind: str) -> bytes:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports where it keeps its font cache
    import matplotlib.style
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "popcompile", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.style.context(["default", settings]):
        figure = Figure(figsize=(8, 4 if not importance.blocks else 3 * len(importance.blocks)), layout="constrained")
        _fill(figure, importance, title, set(pruned or ()))
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _fill(figure: Figure, importance: Importance, title: str, pruned: set[int]) -> None:
    """One pair of axes per block, below each other."""
    blocks = importance.blocks or ("",)
    all_axes = figure.subplots(len(blocks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    values = [v for v in (*importance.prefill, *importance.decode) if v > 0]
    floor = 10 ** _exponent(min(values, default=1.0)) / 3  # where exact zeros stand, below everything else
    for i, (axes, block) in enumerate(zip(all_axes, blocks, strict=True)):
        pick = slice(i, None, len(blocks))
        _stages(axes, importance, pick, floor)
        for layer in sorted(pruned):
            label = "pruned in prefill" if layer == min(pruned) else None
            axes.axvspan(layer - 0.5, layer + 0.5, facecolor="0.88", edgecolor="none", zorder=0, label=label)
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor / 2)
        axes.set_ylabel(f"importance of {_NAMES.get(block, block)}" if block else "importance")
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_title(title or "Importance by stage", loc="left")
    figure.legend(*_entries(all_axes), frameon=False, ncols=4, loc="outside lower center")
    all_axes[-1].set_xlim(-0.5, len(importance.prefill) // len(blocks) - 0.5)
    all_axes[-1].set_xlabel("layer")
    all_axes[-1].xaxis.get_major_locator().set_params(integer=True)


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
