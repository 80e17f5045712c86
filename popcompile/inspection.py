"""Show what the compiler did to a package: passes, layers, FLOPs, and the graph around any pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from popcompile.errors import PopcompileError
from popcompile.package import REPORT, Manifest, check_external_data, check_files, read_manifest
from popcompile.selection import format_layers


def inspect_json(folder: Path) -> dict[str, Any]:
    """Manifest and report as one JSON document: {"manifest": ..., "report": ...}. Raises PopcompileError."""
    manifest, report = _read(folder)
    return {"manifest": asdict(manifest), "report": report}


def inspect_text(folder: Path) -> str:
    """The report for a terminal. Raises PopcompileError."""
    manifest, report = _read(folder)
    with _readable(folder):
        return "\n\n".join([_summary(folder, manifest, report), _pass_table(report), _layer_table(report)]) + "\n"


def inspect_pass(folder: Path, name: str) -> str:
    """The graphs that a pass changed, before and after, as readable code. Raises PopcompileError."""
    _, report = _read(folder)
    with _readable(folder):
        names = [str(record["name"]) for record in report["passes"]]
    matches = [i for i, known in enumerate(names) if known.lower() == name.lower()]
    if not matches:
        raise PopcompileError(f"--pass {name}: no such pass; the passes are {', '.join(dict.fromkeys(names))}")
    parts = []
    for index in matches:
        changed = sorted((folder / "passes").glob(f"{index:02d}-{names[index]}.*.txt"))
        for path in changed:
            stage = path.name.split(".")[-2]
            before = _text_before(folder, index, stage)
            parts += [f"# {stage} before {names[index]}", before, f"# {stage} after {names[index]}", _read_text(path)]
        if not changed:
            parts.append(f"# {names[index]} (pass {index}) changed nothing in this model\n")
    return "\n".join(parts)


def _read(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    check_external_data(folder, manifest)
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PopcompileError(f"{folder}: {REPORT} cannot be read ({error}); convert the model again") from error
    return manifest, report


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """A report of another shape than ours is the user's to replace."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise PopcompileError(
            f"{folder}: {REPORT} is not a report of this popcompile ({type(error).__name__}: {error});"
            " convert the model again"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PopcompileError(f"{path} cannot be read ({error}); convert the model again") from error


def _text_before(folder: Path, index: int, stage: str) -> str:
    """The stage's graph as the last pass before `index` left it; before the split, the one traced graph."""
    best, found = -1, folder / "passes" / "traced.model.txt"
    for path in (folder / "passes").glob("*.txt"):
        match = re.fullmatch(r"(\d+)-\w+\.(\w+)\.txt", path.name)
        if match and best < int(match[1]) < index and match[2] in (stage, "model"):
            best, found = int(match[1]), path
    return _read_text(found)


def _summary(folder: Path, manifest: Manifest, report: dict[str, Any]) -> str:
    flops = report["flops"]
    full, best, pop = (flops[k] / 1e9 for k in ("full_prefill", "full_prefill_one_logit", "pop_prefill"))
    sizes = flops["reference_sizes"]["prefill"]
    pruned = manifest.pruned
    size = sum(f["size"] for f in manifest.files.values()) / 1e6
    rows = [
        ("model", f"{manifest.source['name']} ({manifest.model_type}, {manifest.num_layers} layers)"),
        ("package", f"{folder} ({manifest.layout} layout, {manifest.dtype}, {size:.0f} MB)"),
        ("pruned in prefill", f"{len(pruned)} of {manifest.num_layers} layers: {format_layers(pruned)}"),
        ("KV projection", {"layer": "the layer's own weights"}.get(manifest.kv_projection, manifest.kv_projection)),
        (
            f"prefill FLOPs, {sizes['sequence']} tokens",
            f"{pop:.1f} G; full model {full:.1f} G, with one row of logits {best:.1f} G",
        ),
        ("FLOPs saved", f"{full / pop:.2f}x fewer; by the pruned layers alone {best / pop:.2f}x"),
        ("short prompts", f"below {manifest.prefill_threshold} tokens the runtime takes the full prefill (auto)"),
    ]
    return tabulate(rows, tablefmt="plain")


def _pass_table(report: dict[str, Any]) -> str:
    rows = []
    for record in report["passes"]:
        nodes = [f"{record['nodes_before'][s]} -> {record['nodes_after'][s]}" for s in ("prefill", "decode")]
        before, after = record["flops_before"], record["flops_after"]
        flops = [f"{before[s] / 1e9:.2f} -> {after[s] / 1e9:.2f}" for s in ("prefill", "decode")]
        rows.append([record["name"], record["matches"], *nodes, *flops, f"{record['seconds']:.2f}"])
    headers = ["pass", "matches", "prefill nodes", "decode nodes", "prefill GFLOPs", "decode GFLOPs", "s"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def _layer_table(report: dict[str, Any]) -> str:
    rows = []
    for row in report["layers"]:
        rows.append(
            [
                row["layer"],
                f"sliding {row['window']}" if row["window"] else "full",
                row["prefill_tokens"],
                row["kv_from"],
                "the layer",
                f"{row['full_prefill_flops'] / 1e9:.2f} -> {row['prefill_flops'] / 1e9:.2f}",
            ]
        )
    headers = ["layer", "attention", "prefill runs it for", "K/V of the prompt from", "decode runs", "prefill GFLOPs"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("right", *["left"] * 4, "right"))
