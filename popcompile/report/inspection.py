"""Show what the compiler did to a package: passes, layers, FLOPs, and the graph around any pass."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from popcompile.errors import PopcompileError
from popcompile.package.benchmark import Benchmark
from popcompile.package.compatibility import runtimes
from popcompile.package.graph_check import check_package
from popcompile.package.integrity import read_file
from popcompile.package.manifest import PASSES, REPORT, Manifest, read_manifest
from popcompile.package.measurements import LayerChoice, Measurements, read_measurements
from popcompile.package.report import format_layers
from popcompile.report.bench import first_token_words, measured_on
from popcompile.report.evaluation import evaluation_words, pictures_words
from popcompile.report.images import ImageFlops
from popcompile.report.words import (
    Table,
    answers_cell,
    chosen_by,
    not_measured,
    quality_words,
    ratio,
    share,
    small,
    text_words,
    unmeasured,
)


def inspect_json(folder: Path) -> dict[str, Any]:
    """Manifest and report as one JSON document. Raises PopcompileError.

    {"manifest", "report", "not_measured": of "quality", "time", "importance", "frontier" and, where the model takes
    images, "image_time" and "image_quality" those that the report lacks, with the command that measures, "runtimes":
    [{"runtime", "loads", "note"}]}
    """
    manifest, report = read_package(folder)
    with readable_report(folder):
        missing = unmeasured(folder, manifest, read_measurements(report, manifest))
    known = [asdict(runtime) for runtime in runtimes(manifest)]
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN and no infinity
    return {"manifest": asdict(manifest), "report": report, "not_measured": missing, "runtimes": known}


def inspect_text(folder: Path) -> str:
    """The report for a terminal. Raises PopcompileError."""
    manifest, report = read_package(folder)
    with readable_report(folder):
        found = read_measurements(report, manifest)
        frontier = [_frontier(found.choice)] if found.choice and found.choice.frontier else []
        tables = [*frontier, _passes(report), _layers(report)]
        return "\n\n".join([_summary(folder, manifest, report, found), *tables]) + "\n"


def inspect_pass(folder: Path, name: str) -> str:
    """The graphs that a pass changed, before and after, as readable code. Raises PopcompileError."""
    manifest, report = read_package(folder)
    with readable_report(folder):
        names = [str(record["name"]) for record in report["passes"]]
        summaries = [str(record["summary"]) for record in report["passes"]]
    matches = [i for i, known in enumerate(names) if known.lower() == name.lower()]
    if not matches:
        raise PopcompileError(f"--pass {name}: no such pass; the passes are {', '.join(dict.fromkeys(names))}")
    parts = [f"# {names[matches[0]]}: {summaries[matches[0]]}\n"]
    for index in matches:
        changed = [graph for graph in _pass_graphs(manifest) if (graph.number, graph.name) == (index, names[index])]
        for graph in changed:
            before, after = _text_before(folder, manifest, graph), _read_text(folder, manifest, graph.file)
            stage = graph.stage
            parts += [f"# {stage} before {names[index]}", before, f"# {stage} after {names[index]}", after]
        if not changed:
            parts.append(f"# {names[index]} (pass {index}) changed nothing in this model\n")
    return "\n".join(parts)


def read_package(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """Manifest and report of a package whose files are the ones it was made with. Raises PopcompileError."""
    manifest = read_manifest(folder)
    check_package(folder, manifest)
    try:
        report = json.loads(read_file(folder, manifest, REPORT))
    except (OSError, ValueError, RecursionError) as error:
        raise PopcompileError(f"{folder}: {REPORT} cannot be read ({error}); convert the model again") from error
    if not isinstance(report, dict):
        raise PopcompileError(f"{folder}: {REPORT} is not a report of this popcompile; convert the model again")
    return manifest, report


@contextmanager
def readable_report(folder: Path) -> Iterator[None]:
    """A report of another shape than ours is the user's to replace."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise PopcompileError(
            f"{folder}: {REPORT} is not a report of this popcompile ({type(error).__name__}: {error});"
            " convert the model again"
        ) from error


class _PassGraph(NamedTuple):
    """A file with the graph of a stage after the pass `number`, called `name`."""

    number: int
    name: str
    stage: str
    file: str


def _pass_graphs(manifest: Manifest) -> list[_PassGraph]:
    found = (re.fullmatch(rf"{PASSES}/(\d{{1,9}})-(\w+)\.(\w+)\.txt", name) for name in sorted(manifest.files))
    return [_PassGraph(int(match[1]), match[2], match[3], match[0]) for match in found if match]


def _read_text(folder: Path, manifest: Manifest, name: str) -> str:
    try:
        return read_file(folder, manifest, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PopcompileError(f"{folder}: {name} cannot be read ({error}); convert the model again") from error


def _text_before(folder: Path, manifest: Manifest, graph: _PassGraph) -> str:
    """The stage's graph as the last pass before left it; before the split, the one traced graph."""
    earlier = [g for g in _pass_graphs(manifest) if g.number < graph.number and g.stage in (graph.stage, "model")]
    traced = f"{PASSES}/traced.model.txt"
    name = max(earlier).file if earlier else traced
    if name not in manifest.files:
        raise PopcompileError(f"{folder}: its manifest lists no {name}; convert the model again")
    return _read_text(folder, manifest, name)


def _summary(folder: Path, manifest: Manifest, report: dict[str, Any], found: Measurements) -> str:
    flops = report["flops"]
    full, best, pop = (flops[k] / 1e9 for k in ("full_prefill", "full_prefill_one_logit", "pop_prefill"))
    sizes = flops["reference_sizes"]["prefill"]
    pruned = manifest.pruned
    size = sum(f["size"] for f in manifest.files.values()) / 1e6
    rows = [
        ("model", f"{manifest.source['name']} ({manifest.model_type}, {manifest.num_layers} layers)"),
        *([("part", f"the text decoder of a {whole}")] if (whole := manifest.source.get("text_decoder_of")) else []),
        *([("adapter", f"{adapter}, merged")] if (adapter := manifest.source.get("adapter")) else []),
        ("package", f"{folder} ({manifest.layout} layout, {manifest.dtype}, {size:.0f} MB)"),
        *_graphs(manifest),
        ("pruned in prefill", f"{len(pruned)} of {manifest.num_layers} layers: {format_layers(pruned)}"),
        ("KV projection", {"layer": "the layer's own weights"}.get(manifest.kv_projection, manifest.kv_projection)),
        *_window(manifest),
        *_time(unmeasured(folder, manifest, found), found),
        (
            f"prefill FLOPs, {sizes['sequence']} tokens",
            f"{pop:.1f} G; full model {full:.1f} G, with one row of logits {best:.1f} G",
        ),
        ("FLOPs saved", f"{full / pop:.2f}x fewer; by the pruned layers alone {best / pop:.2f}x"),
        *([("vision FLOPs", images.words())] if (images := ImageFlops.of(flops)) else []),
        *_measured(unmeasured(folder, manifest, found), found),
        *_made_in(report),
        *(("loads in" if known.loads else "does not load in", str(known)) for known in runtimes(manifest)),
    ]
    lines = [(name, textwrap.fill(text, 52, break_long_words=False, break_on_hyphens=False)) for name, text in rows]
    return tabulate(lines, tablefmt="plain", disable_numparse=True)


def _made_in(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How long the conversion took, and those of its steps that took a fiftieth of it or more."""
    if "steps" not in report:
        return []
    steps = sorted(((float(s), str(step)) for step, s in report["steps"].items()), reverse=True)
    longest = [f"{step} {s:.0f} s" for s, step in steps if s >= max(0.5, report["seconds"] / 50)]
    return [("made in", f"{report['seconds']:.0f} s" + (f": {', '.join(longest)}" if longest else ""))]


def _graphs(manifest: Manifest) -> list[tuple[str, str]]:
    """Of a package that takes images, who makes what for whom."""
    if manifest.images is None:
        return []
    graphs, makers = manifest.graphs, ("vision", "embedding")
    made, given = (" and ".join(graphs[stage] for stage in stages) for stages in (makers, manifest.stages))
    return [("graphs", f"{given}, for embeddings of text and images, which {made} make")]


def _window(manifest: Manifest) -> list[tuple[str, str]]:
    if manifest.window == 1 or not manifest.pruned:
        return []
    return [("window", f"a prompt's last {manifest.window} tokens take the whole model, and shorter prompts do")]


def _time(missing: dict[str, str], found: Measurements) -> list[tuple[str, str]]:
    rows = _benchmark("first token", found.benchmark) or [("first token", not_measured(missing["time"]))]
    if "image_time" in missing:
        return [*rows, ("- with images", not_measured(missing["image_time"]))]
    return rows + _benchmark("with images", found.benchmark_images)


def _benchmark(name: str, result: Benchmark | None) -> list[tuple[str, str]]:
    if result is None:
        return []
    rows = [(f"{name}, {tokens:,} tokens", words) for tokens, words in first_token_words(result)]
    return [*rows, ("- measured on", measured_on(result)[0])]


def _measured(missing: dict[str, str], found: Measurements) -> list[tuple[str, str]]:
    """Rows on the choice and on quality."""
    rows = [("layers chosen by", chosen_by(found.choice))]
    if "frontier" in missing:
        rows.append(("frontier", not_measured(missing["frontier"])))
    if found.quality:
        rows.append(("quality on held-out text", quality_words(found.quality)))
        if found.quality.own_projection:
            own = replace(found.quality, loss=found.quality.own_projection)
            rows.append(("- with layers' own K/V", quality_words(own)))
        rows.append(("- measured on", text_words(found.quality)))
    if found.evaluation is not None:
        rows.append(("quality, evaluated", evaluation_words(found.evaluation)))
    if "quality" in missing:
        rows.append(("quality", not_measured(missing["quality"])))
    if found.evaluation_images is not None:
        rows.append(("quality with images", evaluation_words(found.evaluation_images)))
        rows.append(("- measured on", pictures_words(found.evaluation_images)))
    if "image_quality" in missing:
        rows.append(("quality with images", not_measured(missing["image_quality"])))
    return rows


# --- tables for a terminal of 80 columns -----------------------------------------------------------------------


def _text(table: Table, widths: list[int | None] | None = None) -> str:
    """widths: of columns whose cells are broken, None for those that are not."""
    align = [{"l": "left", "r": "right"}[letter] for letter in table.align]
    return tabulate(table.rows, headers=table.headers, disable_numparse=True, colalign=align, maxcolwidths=widths)


def _frontier(choice: LayerChoice) -> str:
    """The frontier without standard errors and agreement, which the page and --json have."""
    rows = []
    with_images = any(point.loss.images is not None for point in choice.shown())
    for point in choice.shown():
        loss = point.loss
        cells = [str(len(point.pruned)), format_layers(point.pruned), str(point.window), f"{point.speedup:.2f}x"]
        cells += [
            small(loss.first_token_kl),
            small(loss.kl),
            answers_cell(loss, error=False),
            ratio(loss.ppl_ratio),
        ]
        if with_images:
            cells.append("" if loss.images is None else small(loss.images.worst_kl))
        else:
            cells.append("" if loss.retrieval_kept is None else share(loss.retrieval_kept))
        rows.append([*cells, "*" * point.chosen + "r" * point.refined])
    last, meaning = ("image", "the worst KL of prompts with images") if with_images else ("kept", "answers")
    headers = ["", "pruned layers", "w", "less", "1st", "next", "asks", "ppl", last, ""]
    legend = (
        f"w: window; less: times fewer FLOPs for {choice.prompt_tokens} tokens; 1st, next, asks: KL in\n"
        "nats of the first token, of those after it, and of answers in the prompt; ppl:\n"
        f"over the full model's; {last}: {meaning};\n"
        "> a lower bound, over the budget; * chosen, r refined by gradients"
    )
    return f"{_text(Table(headers, rows, 'rlrrrrrrrl'), [None, 20, *[None] * 8])}\n{legend}"


def _passes(report: dict[str, Any]) -> str:
    rows = []
    for record in report["passes"]:
        nodes = [_changed(record["nodes_before"][s], record["nodes_after"][s]) for s in ("prefill", "decode")]
        before, after = (f"{record[f'flops_{when}']['prefill'] / 1e9:.1f}" for when in ("before", "after"))
        rows.append([record["name"], record["matches"], *nodes, _changed(before, after), f"{record['seconds']:.1f}"])
    headers = ["pass", "hits", "prefill\nnodes", "decode\nnodes", "prefill\nGFLOPs", "s"]
    return _text(Table(headers, rows, "lrrrrr"))


def _changed(before: object, after: object) -> str:
    return f"{before} -> {after}" if before != after else str(after)


def _layers(report: dict[str, Any]) -> str:
    """Layers that do the same stand in one row."""
    table = layer_table(report)
    rows = []
    for cells, group in groupby(table.rows, lambda row: [row[1], row[2], row[3], row[5]]):
        rows.append([format_layers([int(row[0]) for row in group]), *cells])
    headers = ["layers", "attention", "prefill\nruns it for", "K/V of the\nprompt from", "prefill\nGFLOPs"]
    return _text(Table(headers, rows, "llllr"), [12, None, 16, 22, None])


# --- tables of the page -----------------------------------------------------------------------------------------


def pass_table(report: dict[str, Any]) -> Table:
    """What every pass matched and changed."""
    rows = []
    for record in report["passes"]:
        nodes = [f"{record['nodes_before'][s]} -> {record['nodes_after'][s]}" for s in ("prefill", "decode")]
        before, after = record["flops_before"], record["flops_after"]
        flops = [f"{before[s] / 1e9:.2f} -> {after[s] / 1e9:.2f}" for s in ("prefill", "decode")]
        rows.append([record["name"], record["summary"], record["matches"], *nodes, *flops, f"{record['seconds']:.2f}"])
    headers = [
        "pass",
        "what it does",
        "matches",
        "prefill nodes",
        "decode nodes",
        "prefill GFLOPs",
        "decode GFLOPs",
        "s",
    ]
    return Table(headers, rows, "lwrrrrrr")


def layer_table(report: dict[str, Any]) -> Table:
    """What every layer executes in each stage."""
    rows = []
    for row in report["layers"]:
        rows.append(
            [
                row["layer"],
                f"sliding {row['window']}" if row["window"] else "full",
                row["prefill_tokens"],
                row["kv_from"],
                "the layer",
                _changed(f"{row['full_prefill_flops'] / 1e9:.2f}", f"{row['prefill_flops'] / 1e9:.2f}"),
                f"{row['decode_flops'] / 1e9:.4f}",
            ]
        )
    headers = ["layer", "attention", "prefill runs it for", "K/V of the prompt from", "decode runs"]
    headers += ["prefill GFLOPs", "decode GFLOPs"]
    return Table(headers, rows, "rllllrr", {row["layer"] for row in report["layers"] if row["pruned"]})
