"""The report of a package as one HTML page that needs nothing else: no network, no script, plots as inline SVG."""

from __future__ import annotations

import os
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from popcompile.errors import PopcompileError
from popcompile.package.evaluation import Evaluation, TextMetrics
from popcompile.package.manifest import MANIFEST, Manifest, read_manifest
from popcompile.package.measurements import Measurements, Quality, read_measurements
from popcompile.package.report import format_layers
from popcompile.report.bench import first_token_words, images_words, measured_on, time_rows
from popcompile.report.evaluation import (
    answer_rows,
    baseline_rows,
    code_rows,
    metric_rows,
    pictures_words,
    retrieval_rows,
)
from popcompile.report.images import ImageFlops
from popcompile.report.inspection import layer_table, pass_table, read_package, readable_report
from popcompile.report.output_file import replace_file, require_replaceable_file
from popcompile.report.tasks import task_rows
from popcompile.report.words import (
    LOSS_HEADERS,
    Table,
    chosen_by,
    frontier_table,
    kl_cell,
    loss_cells,
    ratio,
    share,
    text_words,
    unmeasured,
)

TEMPLATE = "page.html.jinja"
#: what the plots show, for who cannot see them
_PLOTS = {
    "time_plot": "Prefill time over the prompt's length",
    "frontier_plot": "Loss over the number of pruned layers",
    "importance_plot": "Importance of every layer in both stages",
    "flops_plot": "FLOPs of every layer in prefill",
}


def write_html(folder: Path, path: Path) -> None:
    """Write the report of the package in `folder` at `path`, in place of a file that is there. Raises PopcompileError
    where the package is damaged or `path` cannot be written or is a file of the package.
    """
    require_replaceable_file("--html", path)
    _require_outside(folder, read_manifest(folder), path)
    replace_file("--html", path, html_report(folder))


def html_report(folder: Path) -> str:
    """The page. Raises PopcompileError."""
    import jinja2
    from markupsafe import Markup

    manifest, report = read_package(folder)
    with readable_report(folder):
        content = _content(folder, manifest, report, read_measurements(report, manifest))
        for name in [name for name in content if name.endswith("_plot")]:
            content[name] = Markup(_inline(content[name], name))  # our own drawing, the one thing not to escape
        template = resources.files("popcompile.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        return environment.from_string(template).render(content)


def _require_outside(folder: Path, manifest: Manifest, path: Path) -> None:
    for name in (*manifest.files, MANIFEST):
        file = folder / name
        same = path.samefile(file) if path.exists() and file.exists() else False
        if same or os.path.realpath(path) == os.path.realpath(file):
            raise PopcompileError(f"--html {path}: is {name} of the package; choose another place")


def _inline(svg: str, name: str) -> str:
    """An <svg> element of matplotlib's for a page with others: no metadata, no XML namespaces, which HTML needs not,
    ids only where they are referred to, and those with the plot's name.
    """
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([\w-]+)', svg))
    svg = re.sub(r'\s+id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\1{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_PLOTS[name]}"', 1)


def _content(folder: Path, manifest: Manifest, report: dict[str, Any], found: Measurements) -> dict[str, Any]:
    """What the template shows."""
    from popcompile.report.plots import flops_svg

    sizes = report["flops"]["reference_sizes"]["prefill"]
    content: dict[str, Any] = {
        "title": re.split(r"[/\\]", str(manifest.source["name"]).rstrip("/\\"))[-1] or str(folder),
        "folder": shlex.quote(str(folder)),
        "manifest": manifest,
        "figures": _figures(manifest, report, found),
        "verdict": _verdict(manifest, report, found),
        "pruned": f"{len(manifest.pruned)} of {manifest.num_layers} layers: {format_layers(manifest.pruned)}",
        "chosen_by": chosen_by(found.choice),
        "projection": _projection(manifest),
        "missing_commands": unmeasured(folder, manifest, found),
        "flops_plot": flops_svg(report["layers"], sizes["sequence"]),
        "flops_text": _flops_text(report),
        "layers": _with_totals(layer_table(report), report["flops"]),
        "passes": pass_table(report),
        "files": _files(manifest),
    }
    if images := ImageFlops.of(report["flops"]):
        content["image_flops"] = _table(*images.rows(), left=1)
        content["image_flops_text"] = (
            f"A prompt of {images.tokens:,} tokens, {images.image_tokens:,} of which are an image's. The vision tower"
            f" is not pruned: with it, the prompt takes {images.speedup:.2f} times fewer FLOPs."
        )
    return content | _measured(manifest, found)


def _measured(manifest: Manifest, found: Measurements) -> dict[str, Any]:
    """The parts of the page that are there where they were measured."""
    from popcompile.report.plots import frontier_svg, importance_svg, prefill_svg

    content: dict[str, Any] = {}
    if found.benchmark is not None:
        content["times"] = _table(*time_rows(found.benchmark), left=2)
        content["time_text"] = "; ".join(measured_on(found.benchmark))
        content["time_plot"] = prefill_svg(found.benchmark)
    if found.benchmark_images is not None:
        content["image_times"] = _table(*time_rows(found.benchmark_images), left=2)
        on = "; ".join(measured_on(found.benchmark_images))
        content["image_time_text"] = f"{images_words(found.benchmark_images)} in every prompt; {on}"
    if found.choice and found.choice.frontier:
        content["frontier_plot"] = frontier_svg(found.choice)
        content["frontier"] = frontier_table(found.choice)
        content["measured"] = len(found.choice.frontier)
    if found.importance:
        content["importance_plot"] = importance_svg(found.importance.importance, manifest.pruned, title=" ")
        content["importance_text"] = (
            "How much the next token's log-probability depends on a layer (squared derivative by a gate on it): in"
            " prefill, on the layer's run over the tokens before the last; in decode, on its run over the last token."
            f" Measured on {found.importance.texts} texts of {found.importance.tokens} tokens; bars are standard errors"
            " over texts; the axis is logarithmic."
        )
    if found.quality:
        content["quality"] = _quality_table(found.quality)
        content["quality_text"] = text_words(found.quality)[0].upper() + text_words(found.quality)[1:]
    if found.evaluation is not None:
        settings = found.evaluation["settings"]
        content["evaluation"] = _table(*metric_rows(found.evaluation), left=1)
        content["evaluation_text"] = (
            f"{settings['prompts']} prompts of each text, {settings['prompt_tokens']} tokens and"
            f" {settings['continuation_tokens']} after them"
        )
        if "baselines" in found.evaluation:
            content["baselines"] = _baselines(found.evaluation)
        if found.evaluation.get("retrieval"):
            content["retrieval"] = _table(*retrieval_rows(found.evaluation), left=2)
        if found.evaluation.get("code"):
            content["code"] = _table(*code_rows(found.evaluation), left=2)
    if found.evaluation_images is not None:
        content["image_evaluation"] = _table(*metric_rows(found.evaluation_images), left=1)
        content["image_evaluation_text"] = pictures_words(found.evaluation_images)
        if "baselines" in found.evaluation_images:
            content["image_baselines"] = _baselines(found.evaluation_images)
        if "answers" in found.evaluation_images:
            content["image_answers"] = _table(*answer_rows(found.evaluation_images), left=2)
    if found.evaluation_tasks is not None:
        content["tasks"] = _table(*task_rows(found.evaluation_tasks), left=2)
    return content


# --- in words --------------------------------------------------------------------------------------------------


def _figures(manifest: Manifest, report: dict[str, Any], found: Measurements) -> list[tuple[str, str]]:
    """The numbers that matter most, with what they are."""
    flops = report["flops"]
    figures = [
        (f"{len(manifest.pruned)} of {manifest.num_layers}", "layers skipped in prefill"),
        (
            f"{flops['full_prefill_one_logit'] / flops['pop_prefill']:.2f}x",
            "fewer FLOPs in prefill",
        ),
    ]
    if images := ImageFlops.of(flops):
        figures.append((f"{images.speedup:.2f}x", f"fewer with vision, an image of {images.image_tokens:,} tokens"))
    if found.benchmark is not None:
        longest = max(found.benchmark["ratios"], key=lambda row: (row["over"] == "full", row["tokens"]))
        figures.append(
            (f"{longest['time_to_first_token']:.2f}x", f"sooner, the first token after {longest['tokens']:,}")
        )
    if found.quality:
        loss = found.quality.loss
        figures += [
            (f"{loss.first_token_kl:.3f}", "nats of KL, first token"),
            (f"{ratio(loss.ppl_ratio)}x", "the full model's perplexity"),
        ]
    elif found.evaluation is not None:
        metrics = _all_texts(found.evaluation)
        figures += [
            (f"{metrics['first_token_kl_mean']['value']:.3f}", "nats of KL, first token"),
            (f"{ratio(metrics['perplexity_ratio']['value'])}x", "the full model's perplexity"),
        ]
    else:
        figures.append(("not measured", "quality"))
    return figures


def _verdict(manifest: Manifest, report: dict[str, Any], found: Measurements) -> str:
    """What was pruned, what it saves, what it costs."""
    flops = report["flops"]
    tokens = flops["reference_sizes"]["prefill"]["sequence"]
    full, one, pop = (flops[k] / 1e9 for k in ("full_prefill", "full_prefill_one_logit", "pop_prefill"))
    if manifest.pruned:
        last = "token" if manifest.window == 1 else f"{manifest.window} tokens"
        runs = (
            f"Layers {format_layers(manifest.pruned)} run for the last {last} of a prompt only; prefill skips them for"
            " what comes before, and decode runs every layer."
        )
    else:
        runs = "Nothing is pruned: prefill and decode run every layer."
    saves = (
        f"A prefill of {tokens:,} tokens takes {pop:.1f} GFLOPs. The full model takes {one:.1f} where it computes one"
        f" row of logits ({one / pop:.2f} times as many), and {full:.1f} with logits of every token"
        f" ({full / pop:.2f} times)."
    )
    return f"{runs} {saves} {_gain(found)}{_cost(found)}"


def _gain(found: Measurements) -> str:
    if found.benchmark is None:
        return ""
    tokens, words = max(first_token_words(found.benchmark))
    return f"Measured, the first token after {tokens:,} tokens takes {words}. "


def _cost(found: Measurements) -> str:
    if found.quality:
        loss = found.quality.loss
        text = (
            f"What it costs, on held-out text: the first token's distribution is {kl_cell(loss)} nats from the full"
            f" model's and has the same likeliest token for {share(loss.first_token_agreement)} of the prompts; the"
            f" perplexity of what follows is {ratio(loss.ppl_ratio)} times the full model's."
        )
        if (images := loss.images) is not None:
            text += (
                f" For prompts with images these are {kl_cell(images)} nats, {share(images.first_token_agreement)} and"
                f" {ratio(images.ppl_ratio)} times."
            )
        own = found.quality.own_projection
        if own:
            text += (
                f" With the layers' own K/V projections it would be {kl_cell(own)} nats and {ratio(own.ppl_ratio)}"
                " times."
            )
        return text
    if found.evaluation is not None:
        metrics = _all_texts(found.evaluation)
        return (
            f"What it costs, by `popcompile evaluate`: {metrics['first_token_kl_mean']['value']:.3f} nats of KL for the"
            f" first token, and {ratio(metrics['perplexity_ratio']['value'])} times the full model's perplexity."
        )
    return "What it costs in quality was not measured."


def _all_texts(evaluation: Evaluation) -> TextMetrics:
    """Metrics over all texts: the last entry."""
    return list(evaluation["texts"].values())[-1]


def _projection(manifest: Manifest) -> str:
    return {
        "layer": "the layer's own weights, on the hidden state before the pruned layers",
        "calibrated": "calibrated weights, fitted to the full model's K/V",
    }.get(manifest.kv_projection, manifest.kv_projection)


def _flops_text(report: dict[str, Any]) -> str:
    sizes = report["flops"]["reference_sizes"]
    return (
        f"FLOPs that each layer takes in a prefill of {sizes['prefill']['sequence']:,} tokens, in the full model and in"
        f" this package. The table adds decode: one token after {sizes['decode']['past']:,}."
    )


# --- tables ----------------------------------------------------------------------------------------------------


def _table(headers: list[str], rows: list[list[str]], left: int) -> Table:
    """A table with `left` columns of text, then numbers."""
    return Table(headers, rows, "l" * left + "r" * (len(headers) - left))


def _baselines(evaluation: Evaluation) -> Table:
    """The package's rows are marked."""
    table = _table(*baseline_rows(evaluation), left=2)
    own = {i for i, row in enumerate(table.rows) if row[1].startswith("this package")}
    return Table(table.headers, table.rows, table.align, own)


def _quality_table(quality: Quality) -> Table:
    measured = {"this package": quality.loss}
    if quality.own_projection:
        measured["the same layers, their own K/V projections"] = quality.own_projection
    rows = [[name, *loss_cells(loss)] for name, loss in measured.items()]
    with_images = [
        [f"{name}, prompts with images", *loss_cells(loss.images)]
        for name, loss in measured.items()
        if loss.images is not None
    ]
    marked = {0, len(rows)} if with_images else {0}
    return Table(["", *LOSS_HEADERS], rows + with_images, "l" + "r" * len(LOSS_HEADERS), marked)


def _with_totals(table: Table, flops: dict[str, Any]) -> Table:
    """The whole model below the layers: embedding and LM head are of no layer."""
    change = f"{flops['full_prefill'] / 1e9:.2f} -> {flops['pop_prefill'] / 1e9:.2f}"
    total = ["all", *[""] * (len(table.headers) - 4), "with the LM head", change, f"{flops['decode'] / 1e9:.4f}"]
    return Table(table.headers, [*table.rows, total], table.align, table.marked)


def _files(manifest: Manifest) -> Table:
    """The package's files; those of a folder in it together."""
    rows: list[list[str]] = []
    inside: dict[str, list[int]] = {}
    for name, entry in manifest.files.items():
        top, _, rest = name.partition("/")
        if rest:
            inside.setdefault(top, []).append(entry["size"])
        else:
            rows.append([name, f"{entry['size']:,}", f"{entry['sha256'][:16]}…"])
    rows += [[f"{name}/ ({len(sizes)} files)", f"{sum(sizes):,}", ""] for name, sizes in inside.items()]
    return Table(["file", "bytes", "SHA-256"], rows, "lrl")
