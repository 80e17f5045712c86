"""Convert a model into a package: trace, transform, lower, export."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from popcompile.checkpoint import Checkpoint
from popcompile.errors import PopcompileError
from popcompile.export.genai_config import PROVIDER_OPTIONS, genai_config
from popcompile.export.onnx_graph import input_names, output_names, to_onnx
from popcompile.export.weights import WeightError, data_size, pending_initializers, write_weights
from popcompile.layer_table import full_prefill_one_logit, layer_table
from popcompile.package import (
    FORMAT_VERSION,
    MANIFEST,
    REPORT,
    WEIGHTS,
    Manifest,
    describe_files,
)
from popcompile.passes import ContractError, Pass, PassManager, PassRecord, Program, lowering, transformations
from popcompile.passes.flops import REFERENCE_SIZES, total_flops
from popcompile.passes.graph import find, outputs_of, shape_of
from popcompile.passes.ops import append_kv
from popcompile.passes.printing import print_graph
from popcompile.selection import select_layers
from popcompile.source import Source, open_source
from popcompile.staging import require_disk_space, require_writable, staged
from popcompile.tracing import trace

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
LAYOUTS = ("split",)
KV_PROJECTIONS = ("layer",)
GRAPHS = {"prefill": "prefill.onnx", "decode": "decode.onnx"}

#: tokens below which the whole model encodes a prompt in the time that the pruned one takes: both are bound by reading
#: the weights then (README, "Short prompts")
PREFILL_THRESHOLD = 16

#: progress(step, done, total): done and total in the step's own unit
Progress = Callable[[str, int, int], Any]


def convert(
    model: str | Path,
    out: str | Path,
    *,
    prune: str | int | float | None = None,
    layers: str | None = None,
    kv_projection: str = "layer",
    layout: str = "split",
    dtype: str = "fp32",
    provider: str = "cpu",
    gguf_file: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compile `model` (hub id, folder or GGUF file) into a package at `out`; returns the package's manifest.

    prune: how many layers prefill skips, a count or a fraction; layers: which ones ("20-29,17"). Default: a third, the
    deepest. dtype: of weights and activations, "fp32" or "fp16". provider: what onnxruntime-genai is told to run on.
    `out` appears whole or not at all. Raises PopcompileError for what the user can mend.
    """
    out = Path(out)
    _require_choice("--dtype", dtype, DTYPES)
    _require_choice("--layout", layout, LAYOUTS)
    _require_choice("--kv-projection", kv_projection, KV_PROJECTIONS)
    _require_choice("--provider", provider, PROVIDER_OPTIONS)
    require_writable(out, force)
    started = time.perf_counter()
    report_progress = progress or (lambda *_: None)
    source = open_source(
        str(model), gguf_file=gguf_file, random_weights=random_weights, trust_remote_code=trust_remote_code
    )
    pruned = select_layers(source.config.num_hidden_layers, prune, layers)
    report_progress("trace", 0, 1)
    program = trace(source.config, DTYPES[dtype], trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source, program, DTYPES[dtype])
    shapes = _ModelShapes(program)
    require_disk_space(out, checkpoint.size)
    with staged(out, force) as folder:
        try:
            report = _compile(program, pruned, folder, report_progress)
        except ContractError as error:
            raise PopcompileError(
                f"{source.name}: {source.config.model_type} has a structure that popcompile does not know ({error});"
                " it supports decoders of attention and feed-forward layers"
            ) from error
        models = {}
        for i, stage in enumerate(GRAPHS):
            report_progress("export", i, len(GRAPHS))
            models[stage] = to_onnx(program.graphs[stage], program.num_layers, stage)
        hashes = {WEIGHTS: _write_weights(folder, models, program, checkpoint, source.name, report_progress)}
        for stage, file in GRAPHS.items():
            ir.save(models[stage], folder / file)
        _write_configs(folder, source, shapes, provider)
        report["seconds"] = round(time.perf_counter() - started, 1)
        _write_json(folder / REPORT, report)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            popcompile=version("popcompile"),
            source={"name": source.name, "kind": source.kind, **source.fingerprint()},
            model_type=source.config.model_type,
            num_layers=program.num_layers,
            num_kv_heads=shapes.kv_heads,
            head_size=shapes.head_size,
            vocab_size=shapes.vocab_size,
            context_length=program.max_positions,
            pruned=pruned,
            kv_projection=kv_projection,
            dtype=dtype,
            layout=layout,
            prefill_threshold=PREFILL_THRESHOLD if pruned else 0,
            graphs=GRAPHS,
            weights=WEIGHTS,
            inputs=input_names(program.num_layers),
            outputs=output_names(program.num_layers),
            versions=_versions(),
        )
        manifest = replace(manifest, files=describe_files(folder, hashes))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        report_progress("flush", 0, 1)
    report_progress("done", 1, 1)
    return manifest


class _ModelShapes:
    """Sizes that configs and manifest need, read from the traced graph."""

    def __init__(self, program: Program) -> None:
        graph = program.graphs["model"]
        cache = shape_of(find(graph, op=append_kv)[0])
        self.kv_heads, self.head_size = int(cache[1]), int(cache[3])
        self.vocab_size = int(shape_of(outputs_of(graph)[0])[2])


def _require_choice(option: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise PopcompileError(f"{option} {value}: unknown; choose one of {', '.join(choices)}")


def _compile(program: Program, pruned: list[int], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run all passes; write the graph after every pass to passes/, and return the report."""
    texts = folder / "passes"
    texts.mkdir()
    groups = (transformations(pruned), lowering())
    total = sum(len(g) for g in groups)
    records: list[PassRecord] = []
    table: list[dict[str, Any]] = []
    flops: dict[str, int] = {}
    for group in groups:
        done = len(records)

        def observe(index: int, compiler_pass: Pass, stage: str, before: str, after: str, done: int = done) -> None:
            progress("compile", done + index + 1, total)
            if before != after:
                path = texts / f"{done + index:02d}-{compiler_pass.name}.{stage}.txt"
                path.write_text(after, encoding="utf-8")

        if not records:
            (texts / "traced.model.txt").write_text(print_graph(program.graphs["model"], "model"), encoding="utf-8")
        records += PassManager(group, observe).run(program)
        if not table:
            table = layer_table(program, pruned)
            flops = {
                "full_prefill": total_flops(program.graphs["decode"], "prefill"),
                "full_prefill_one_logit": full_prefill_one_logit(program.graphs["decode"]),
                "pop_prefill": total_flops(program.graphs["prefill"], "prefill"),
                "decode": total_flops(program.graphs["decode"], "decode"),
            }
    return {
        "passes": [asdict(r) for r in records],
        "layers": table,
        "flops": {"reference_sizes": REFERENCE_SIZES, **flops},
    }


def _write_weights(
    folder: Path, models: dict[str, ir.Model], program: Program, checkpoint: Checkpoint, name: str, progress: Progress
) -> str:
    """Write the data file; returns its SHA-256."""
    size = data_size(pending_initializers(models))
    require_disk_space(folder, size)
    written = 0

    def count(_: str, length: int) -> None:
        nonlocal written
        written += length
        progress("weights", written, size)

    try:
        return str(write_weights(folder / WEIGHTS, models, program, checkpoint.read, count)["sha256"])
    except WeightError as error:
        raise PopcompileError(f"{name}: {error}; mend the checkpoint or choose another --dtype") from error


def _write_configs(folder: Path, source: Source, shapes: _ModelShapes, provider: str) -> None:
    source.config.save_pretrained(folder)
    source.generation_config.save_pretrained(folder)
    source.save_tokenizer(folder)
    _write_json(
        folder / "genai_config.json",
        genai_config(
            source.config,
            source.generation_config,
            graphs=GRAPHS,
            head_size=shapes.head_size,
            kv_heads=shapes.kv_heads,
            vocab_size=shapes.vocab_size,
            provider=provider,
        ),
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnxscript")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, "onnxruntime": _onnxruntime()}


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
