"""Convert a model into a package: trace, transform, lower, export."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from popcompile.arguments import COUNT, NATS, POSITIVE, RATIO, SEED
from popcompile.errors import PopcompileError
from popcompile.export.genai_config import genai_config
from popcompile.export.io_names import input_names, output_names
from popcompile.export.onnx_graph import to_onnx
from popcompile.export.providers import PROVIDERS
from popcompile.export.weights import WeightError, data_size, pending_initializers, write_weights
from popcompile.files import require_utf8
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.positions import context_length
from popcompile.frontend.source import Source, open_source
from popcompile.frontend.tensor_names import settle_ties
from popcompile.frontend.tracing import trace
from popcompile.package.graph_check import read_graphs
from popcompile.package.integrity import CODE_FIELDS
from popcompile.package.manifest import (
    FORMAT_VERSION,
    LAYOUTS,
    MANIFEST,
    PASSES,
    REPORT,
    Layout,
    Manifest,
    describe_files,
)
from popcompile.package.staging import require_apart, require_disk_space, require_writable, staged
from popcompile.passes import (
    ContractError,
    Pass,
    PassManager,
    PassRecord,
    Program,
    canonicalization,
    pruning,
)
from popcompile.passes.flops import REFERENCE_SIZES, total_flops
from popcompile.passes.graph import find, outputs_of, shape_of
from popcompile.passes.ops import append_kv
from popcompile.passes.printing import print_graph
from popcompile.precision import BLOCK_SIZE, PRECISIONS, Precision, precision
from popcompile.progress import Progress
from popcompile.pruning.analyze import source_tokenizer
from popcompile.pruning.costs import full_prefill_one_logit, layer_table
from popcompile.pruning.plan import MAX_KL, PROMPT_TOKENS, Options, Plan, make_plan, needs_weights
from popcompile.pruning.refinement import STEPS
from popcompile.pruning.request import parse_request, require_request
from popcompile.pruning.search import Budget
from popcompile.pruning.text import FEWEST, SELF, TEXTS, WINDOW, WINDOWS
from popcompile.text.documents import read_texts

KV_PROJECTIONS = ("calibrated", "layer")


def convert(
    model: str | Path,
    out: str | Path,
    *,
    prune: str | int | float | None = None,
    layers: str | None = None,
    window: int | None = None,
    prompt_tokens: int | None = None,
    kv_projection: str | None = None,
    calibration: str = SELF,
    calibration_texts: int = TEXTS,
    refinement_steps: int = STEPS,
    max_kl: float | None = None,
    max_ppl_ratio: float | None = None,
    seed: int = 0,
    layout: str = "split",
    dtype: str | None = None,
    block_size: int = BLOCK_SIZE,
    provider: str = "cpu",
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compile `model` into a package at `out`, which appears whole or not at all; returns the package's manifest.

    model: hub id ("org/name", also "org/name@revision"), folder with safetensors, or GGUF file.

    What prefill skips:
        prune: how many layers, a count or a fraction of them, or "auto", the default: as many as the budget allows.
        layers: which ones, "20-29,17"; in place of `prune`.
        max_kl, max_ppl_ratio: the budget of "auto", measured on held-out text: KL in nats against the whole model, of
            the first token, of those after it and of answers that stand in the prompt, each (default 0.05), and
            perplexity over the whole model's.
        prompt_tokens: the length of the prompts that layers and window are chosen for, 1,024 by default.
        window: how many tokens at a prompt's end run through the whole model, so that shorter prompts are encoded in
            full. 64 by default, or a quarter of a shorter context; "auto" takes a half or a quarter of that where
            prompts of `prompt_tokens` gain 5% by it within the budget. 1 is the paper's, without answers among the
            text.

    What takes the place of skipped layers:
        kv_projection: "calibrated", the default, or "layer", the layers' own weights.
        calibration: "self", text sampled from the model, or a text file; calibration_texts: how many pieces of it.
        refinement_steps: of gradient descent after the fit in closed form, 0 for none.
        seed: of what is sampled.

    What is written:
        layout: "split", prefill.onnx and decode.onnx, or "unified", model.onnx alone.
        dtype: of weights and activations: "fp32" (the default) or "fp16" on the CPU, "fp16" (the default) or "bf16" on
            CUDA. With "int8" and "int4" the weights of linear layers are quantized, in blocks of `block_size` input
            features; with "w8a8", on the CPU, most of these layers multiply in int8, with a scale for every token.
        provider: what the graphs are lowered for and what onnxruntime-genai is told to run on, "cpu" or "cuda".
        force: replace a package at `out`.

    The model:
        adapter: a PEFT adapter (LoRA), hub id or folder, to merge into the weights first.
        gguf_file: which GGUF file of a folder or a hub id.
        random_weights: take the config alone; by default a third of the layers is skipped then, with their own
            weights, and nothing is measured.
        trust_remote_code: run model code that the checkpoint brings.

    progress(step, done, total) is called as work is done, in the step's own unit.

    Raises PopcompileError for what the user can fix.
    """
    out = Path(out)
    _require_choice("--provider", provider, PROVIDERS)
    dtype = dtype if dtype is not None else PROVIDERS[provider].dtypes[0]
    _require_choice("--dtype", dtype, PRECISIONS)
    _require_choice("--layout", layout, LAYOUTS)
    if random_weights:
        kv_projection = kv_projection or "layer"
        prune = "1/3" if prune is None and layers is None else prune
    kv_projection = kv_projection or KV_PROJECTIONS[0]
    _require_choice("--kv-projection", kv_projection, KV_PROJECTIONS)
    chosen = precision(dtype, provider, block_size)
    if window is not None:
        POSITIVE.require("--window", window)
    if prompt_tokens is not None:
        POSITIVE.require("--prompt-tokens", prompt_tokens)
    _require_texts(calibration_texts)
    COUNT.require("--refinement-steps", refinement_steps)
    SEED.require("--seed", seed)
    budget = _budget(require_request(prune, layers), max_kl, max_ppl_ratio)
    if adapter is not None and random_weights:
        raise PopcompileError(f"--adapter {adapter}: there are no weights to merge it into; leave --random-weights out")
    if calibration != SELF:
        read_texts(Path(calibration))  # a file that cannot be used is reported before any work
    require_utf8(out.absolute())
    require_writable(out, force)
    if force:
        inputs = {"MODEL": model, "--adapter": adapter, "--calibration": None if calibration == SELF else calibration}
        require_apart(out, inputs)
    started = time.perf_counter()
    report_progress = progress or (lambda *_: None)
    source = open_source(
        str(model), gguf_file=gguf_file, random_weights=random_weights, trust_remote_code=trust_remote_code
    )
    merged = Adapter(str(adapter)) if adapter is not None else None
    num_layers = source.config.num_hidden_layers
    request = parse_request(num_layers, prune, layers)
    prompt_tokens = _prompt_tokens(source, prompt_tokens, window)
    options = Options(
        windows=_windows(source, window, prompt_tokens, request.how == "auto"),
        prompt_tokens=prompt_tokens,
        calibrated=kv_projection == "calibrated",
        origin=calibration,
        texts=calibration_texts,
        steps=refinement_steps,
        budget=budget,
        seed=seed,
    )
    tokenizer = None
    if needs_weights(num_layers, request, options):
        tokenizer = source_tokenizer(source, trust_remote_code)
    report_progress("trace", 0, 1)
    settle_ties(source)
    program = trace(source.config, chosen.dtype, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source, program, chosen.dtype, merged)
    shapes = _ModelShapes(program, chosen)
    _require_kernels(source, shapes, provider, chosen)
    require_disk_space(out, chosen.bytes(checkpoint.parameters))
    with staged(out, force) as folder:
        try:
            compilation = _Compilation(program, folder, report_progress)
            compilation.run(canonicalization(), "canonicalize")
            plan = make_plan(
                program, checkpoint.read, source.name, tokenizer, request, options, folder, report_progress
            )
            program.constants.update(plan.calibration.constants())
            report = compilation.prune_and_lower(plan, chosen)
        except ContractError as error:
            raise PopcompileError(
                f"{source.name}: {source.config.model_type} has a structure that popcompile does not know ({error});"
                " it supports decoders of attention and feed-forward layers"
            ) from error
        files = LAYOUTS[layout]
        report_progress("export", 0, 1)
        models = to_onnx(program, files.graphs, provider)
        data = folder / files.weights
        hashes = {files.weights: _write_weights(data, models, program, checkpoint, source.name, report_progress)}
        for stage, file in files.graphs.items():
            ir.save(models[stage], folder / file)
        _write_configs(folder, source, shapes, files, provider)
        report["seconds"] = round(time.perf_counter() - started, 1)
        _write_json(folder / REPORT, report)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            popcompile=version("popcompile"),
            source=_described(source, merged),
            model_type=source.config.model_type,
            num_layers=program.num_layers,
            num_kv_heads=shapes.kv_heads,
            head_size=shapes.head_size,
            vocab_size=shapes.vocab_size,
            context_length=program.max_positions,
            pruned=plan.pruned,
            kv_projection=kv_projection if plan.calibration.projections else "layer",
            dtype=dtype,
            block_size=chosen.quantization.block_size if chosen.quantization else 0,
            provider=provider,
            layout=layout,
            window=plan.window if plan.pruned else 1,
            graphs=files.graphs,
            weights=files.weights,
            inputs=input_names(program.num_layers),
            outputs=output_names(program.num_layers),
            versions=_versions(),
        )
        manifest = replace(manifest, files=describe_files(folder, files.weights, hashes))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _require_readable(folder, manifest, source.name)
        report_progress("flush", 0, 1)
    report_progress("done", 1, 1)
    return manifest


def _require_readable(folder: Path, manifest: Manifest, name: str) -> None:
    """What every use of the package checks: what an architecture is exported with, and what packages may have, are two
    lists. Raises PopcompileError.
    """
    try:
        read_graphs(folder, manifest)
    except PopcompileError as error:
        what = str(error).removeprefix(f"{folder}: ").partition(";")[0]
        raise PopcompileError(
            f"{name}: {manifest.model_type} is exported with operators that packages may not have ({what}); report it"
        ) from error


def _described(source: Source, adapter: Adapter | None) -> dict[str, str]:
    """What the manifest says of the model."""
    described = {"name": source.name, "kind": source.kind, **source.fingerprint()}
    return described | ({"adapter": adapter.name, "adapter_sha256": adapter.sha256} if adapter else {})


class _ModelShapes:
    """Sizes that configs and manifest need, read from the traced graph. head_size: as the package's graphs have it."""

    def __init__(self, program: Program, chosen: Precision) -> None:
        graph = program.graphs["model"]
        cache = shape_of(find(graph, op=append_kv)[0])
        self.kv_heads, self.head_size = int(cache[1]), chosen.attention.padded(int(cache[3]))
        self.vocab_size = int(shape_of(outputs_of(graph)[0])[2])


def _require_kernels(source: Source, shapes: _ModelShapes, provider: str, chosen: Precision) -> None:
    limit = chosen.attention.max_head_size
    if limit is not None and shapes.head_size > limit:
        raise PopcompileError(
            f"{source.name}: its heads have {shapes.head_size} features, and ONNX Runtime's attention takes at most"
            f" {limit} on {provider}; choose another --provider"
        )


def _prompt_tokens(source: Source, asked: int | None, window: int | None) -> int:
    """The length of prompts that the choice is made for. Raises PopcompileError for one that leaves no choice."""
    context = context_length(source.config)
    if asked is None:
        return min(PROMPT_TOKENS, context)
    if asked > context:
        raise PopcompileError(f"--prompt-tokens {asked}: more than the model's context of {context}; give fewer")
    if asked <= (window or 1):
        raise PopcompileError(
            f"--prompt-tokens {asked}: prompts of up to {window or 1} tokens are encoded in full, whatever is pruned;"
            " give more"
        )
    return asked


def _windows(source: Source, window: int | None, prompt_tokens: int, choose: bool) -> list[int]:
    """The window that was asked for, or else the default one, as far as the context and such prompts allow, and, where
    one is to be chosen, smaller ones.

    Raises PopcompileError for one that leaves no room for a prompt to prune and measure.
    """
    context = context_length(source.config)
    most = max(1, context // WINDOWS)
    if window is not None and window > most:
        raise PopcompileError(
            f"--window {window}: too large for the model's context of {context} tokens, for prompts that are no longer"
            f" are encoded in full; give at most {most}"
        )
    if window is not None:
        return [window]
    largest = min(WINDOW, most, max(1, prompt_tokens // 2))
    return sorted({max(1, largest // part) for part in ((1, 2, 4) if choose else (1,))}, reverse=True)


def _require_choice(option: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise PopcompileError(f"{option} {value}: unknown; choose one of {', '.join(choices)}")


def _require_texts(count: int) -> None:
    POSITIVE.require("--calibration-texts", count)
    if count < FEWEST:
        raise PopcompileError(f"--calibration-texts {count}: too few to fit anything; give at least {FEWEST}")


def _budget(how: str, max_kl: float | None, max_ppl_ratio: float | None) -> Budget:
    """how: the request's."""
    if max_kl is None and max_ppl_ratio is None:
        return Budget(max_kl=MAX_KL)
    if how != "auto":
        raise PopcompileError("--max-kl and --max-ppl-ratio are budgets of --prune auto; leave them or the layers out")
    if max_kl is not None:
        NATS.require("--max-kl", max_kl)
    if max_ppl_ratio is not None:
        RATIO.require("--max-ppl-ratio", max_ppl_ratio)
    return Budget(max_kl, max_ppl_ratio)


class _Compilation:
    """Runs passes over a program, writes the graph after every pass to passes/, and collects the report."""

    def __init__(self, program: Program, folder: Path, progress: Progress) -> None:
        self._program, self._texts, self._progress = program, folder / PASSES, progress
        self._records: list[PassRecord] = []
        self._texts.mkdir()
        traced = print_graph(program.graphs["model"], "model")
        (self._texts / "traced.model.txt").write_text(traced, encoding="utf-8")

    def run(self, passes: Sequence[Pass], step: str = "compile") -> None:
        """step: of the progress that is reported."""
        done = len(self._records)

        def observe(index: int, compiler_pass: Pass, stage: str, before: str, after: str) -> None:
            self._progress(step, index + 1, len(passes))
            if before != after:
                path = self._texts / f"{done + index:02d}-{compiler_pass.name}.{stage}.txt"
                path.write_text(after, encoding="utf-8")

        self._records += PassManager(passes, observe).run(self._program)

    def prune_and_lower(self, plan: Plan, chosen: Precision) -> dict[str, Any]:
        """Compile the canonical program as planned; returns the report."""
        maps, window = plan.calibration, plan.window
        self.run(pruning(plan.pruned, maps.projections, maps.bypasses, window))
        prefill, decode = self._program.graphs["prefill"], self._program.graphs["decode"]
        table = layer_table(self._program, plan.pruned, window)
        flops = {
            "reference_sizes": REFERENCE_SIZES,
            "full_prefill": total_flops(decode, "prefill"),
            "full_prefill_one_logit": full_prefill_one_logit(decode),
            "pop_prefill": total_flops(prefill, "prefill"),
            "decode": total_flops(decode, "decode"),
        }
        self.run(chosen.lowering(), "lower")
        return {"passes": [asdict(r) for r in self._records], "layers": table, "flops": flops, **plan.sections}


def _write_weights(
    file: Path, models: dict[str, ir.Model], program: Program, checkpoint: Checkpoint, name: str, progress: Progress
) -> str:
    """Write the data file; returns its SHA-256."""
    size = data_size(pending_initializers(models))
    require_disk_space(file.parent, size)
    written = 0

    def count(_: str, length: int) -> None:
        nonlocal written
        written += length
        progress("weights", written, size)

    try:
        return str(write_weights(file, models, program, checkpoint.read, count)["sha256"])
    except WeightError as error:
        raise PopcompileError(f"{name}: {error}; fix the checkpoint or choose another --dtype") from error


def _write_configs(folder: Path, source: Source, shapes: _ModelShapes, layout: Layout, provider: str) -> None:
    source.config.save_pretrained(folder)
    source.generation_config.save_pretrained(folder)
    source.save_tokenizer(folder)
    _leave_out_code(folder)
    _write_json(
        folder / "genai_config.json",
        genai_config(
            source.config,
            source.generation_config,
            graphs=layout.graphs,
            head_size=shapes.head_size,
            kv_heads=shapes.kv_heads,
            vocab_size=shapes.vocab_size,
            provider=provider,
        ),
    )


def _leave_out_code(folder: Path) -> None:
    """Of a model or tokenizer that is code of its checkpoint: transformers copies it and names it in the configs.

    The graphs are the model, and a package that asked to run code would be refused.
    """
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        config = json.loads(path.read_bytes())
        if set(config) & set(CODE_FIELDS):
            _write_json(path, {field: value for field, value in config.items() if field not in CODE_FIELDS})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnxscript")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, "onnxruntime": _onnxruntime()}


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
