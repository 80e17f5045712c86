"""Convert a model into a package: trace, transform, lower, export."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from popcompile.arguments import require_choice
from popcompile.errors import PopcompileError
from popcompile.export.precisions import PRECISIONS
from popcompile.export.providers import PROVIDERS
from popcompile.files import require_utf8, stamps
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import Source, open_source
from popcompile.frontend.tensor_names import settle_ties
from popcompile.frontend.tracing import trace
from popcompile.package.manifest import LAYOUTS, PASSES, Manifest
from popcompile.package.staging import require_apart, require_disk_space, require_writable, staged
from popcompile.packaging import ModelSizes, PackageWriter
from popcompile.passes import ContractError, Pass, PassManager, PassRecord, Program, canonicalization, pruning
from popcompile.passes.flops import REFERENCE_SIZES, image_flops, total_flops
from popcompile.passes.printing import print_graph
from popcompile.progress import Progress, StepTimes
from popcompile.pruning.analyze import source_tokenizer
from popcompile.pruning.costs import full_prefill_one_logit, layer_table
from popcompile.pruning.device import find_device, memory_explained
from popcompile.pruning.image_prompts import asking_processor, image_source
from popcompile.pruning.plan import Plan, make_plan, needs_weights
from popcompile.pruning.refinement import STEPS
from popcompile.pruning.settings import KV_PROJECTIONS, PruningSettings
from popcompile.pruning.steps import COMPUTED, KeptSteps
from popcompile.pruning.text import SELF, TEXTS
from popcompile.target import BLOCK_SIZE, Target
from popcompile.vision.tracing import build_model, trace_images


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
    calibration_images: str | Path | None = None,
    calibration_texts: int = TEXTS,
    refinement_steps: int = STEPS,
    device: str = "cpu",
    max_kl: float | None = None,
    max_ppl_ratio: float | None = None,
    seed: int = 0,
    layout: str = "split",
    dtype: str | None = None,
    block_size: int = BLOCK_SIZE,
    provider: str = "cpu",
    text_only: bool = False,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    resume: bool = False,
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
        calibration: "self", text sampled from the model, or a text file; calibration_texts: how many pieces of it, of
            which half are prompts with images where the model takes these.
        calibration_images: a folder with pictures for these, by default self-made ones.
        refinement_steps: of gradient descent after the fit in closed form, 0 for none.
        seed: of what is sampled.
        device: what PyTorch runs the model on to sample, fit and measure, "cpu", "cuda" or "cuda:N"; what it decides
            differs by rounding alone. A GPU that has no room for the model in fp32 takes a layer at a time.

    What is written:
        layout: "split", prefill.onnx and decode.onnx, or "unified", model.onnx alone.
        dtype: of weights and activations: "fp32" (the default) or "fp16" on the CPU, "fp16" (the default) or "bf16" on
            CUDA. With "int8" and "int4" the weights of linear layers are quantized, in blocks of `block_size` input
            features; with "w8a8", on the CPU, most of these layers multiply in int8, with a scale for every token.
        provider: what the graphs are lowered for and what onnxruntime-genai is told to run on, "cpu" or "cuda".
        force: replace a package at `out`.
        resume: keep what long steps make in a folder beside `out`, "{out}.steps", until the package is there, and go on
            from what a conversion that was stopped has kept there, if it was asked for the same.

    The model:
        text_only: take the text decoder of a multimodal model; a model of text alone is taken as it is.
        adapter: a PEFT adapter (LoRA), hub id or folder, to merge into the weights first.
        gguf_file: which GGUF file of a folder or a hub id.
        random_weights: take the config alone; by default a third of the layers is skipped then, with their own
            weights, and nothing is measured.
        trust_remote_code: run model code that the checkpoint brings.

    progress(step, done, total) is called as work is done, in the step's own unit.

    Raises PopcompileError for what the user can fix.
    """
    out = Path(out)
    target = _target(provider, dtype, block_size)
    require_choice("--layout", layout, LAYOUTS)
    place = find_device(device)
    if random_weights:
        kv_projection = kv_projection or "layer"
        prune = "1/3" if prune is None and layers is None else prune
    asked = PruningSettings(
        prune=prune,
        layers=layers,
        window=window,
        prompt_tokens=prompt_tokens,
        kv_projection=kv_projection or KV_PROJECTIONS[0],
        calibration=calibration,
        calibration_images=None if calibration_images is None else str(calibration_images),
        calibration_texts=calibration_texts,
        refinement_steps=refinement_steps,
        max_kl=max_kl,
        max_ppl_ratio=max_ppl_ratio,
        seed=seed,
    )
    if adapter is not None and random_weights:
        raise PopcompileError(f"--adapter {adapter}: there are no weights to merge it into; leave --random-weights out")
    inputs = {
        "MODEL": model,
        "--adapter": adapter,
        "--calibration": None if calibration == SELF else calibration,
        "--calibration-images": calibration_images,
    }
    _require_place(out, inputs, force)

    started = time.perf_counter()
    report_progress = StepTimes(progress)
    source = open_source(
        str(model),
        text_only=text_only,
        gguf_file=gguf_file,
        random_weights=random_weights,
        trust_remote_code=trust_remote_code,
    )
    source.processor_files()  # a model of images without one is refused before any work
    merged = Adapter(str(adapter)) if adapter is not None else None
    request, options = asked.for_model(
        source.decoder_config, takes_images=source.has_images, int8_activations=target.int8_activations
    )
    measures = needs_weights(source.decoder_config.num_hidden_layers, request, options)
    tokenizer = source_tokenizer(source, trust_remote_code) if measures else None
    processor = asking_processor(source, options.pictures) if measures else None
    kept = KeptSteps(_beside(out, ".steps"), _key(source, inputs, target, asked)) if resume else COMPUTED
    report_progress("trace", 0, 1)
    settle_ties(source)
    program = trace(source.config, target.dtype, trust_remote_code=trust_remote_code)
    if source.has_images:
        program.add(trace_images(build_model(source.config, target.dtype)))
    images = image_source(processor, source, program, options.pictures)
    checkpoint = Checkpoint(source, program, target.dtype, merged)
    sizes = ModelSizes.of(program, target)
    _require_kernels(source, sizes, target)
    require_disk_space(out, target.weight_bytes(checkpoint.parameters))
    with staged(out, force) as folder:
        compilation = _Compilation(program, folder, report_progress)
        with _structures_explained(source):
            compilation.run(canonicalization(), "canonicalize")
            with memory_explained(place):
                plan = make_plan(
                    program, checkpoint.read, source.name, tokenizer, request, options, folder, report_progress,
                    images=images, steps=kept, device=place,
                )  # fmt: skip
            report = compilation.prune_and_lower(plan, target)
        writer = PackageWriter(folder, layout, source, merged, checkpoint, target, report_progress)
        writer.write_model(program)
        writer.write_configs(sizes)
        report_progress("flush", 0, 1)
        steps = {step: round(seconds, 1) for step, seconds in report_progress.seconds.items()}
        writer.write_report(report | {"seconds": round(time.perf_counter() - started, 1), "steps": steps})
        manifest = writer.write_manifest(program, plan, sizes)
    kept.remove()
    report_progress("done", 1, 1)
    return manifest


def _target(provider: str, dtype: str | None, block_size: int) -> Target:
    require_choice("--provider", provider, PROVIDERS)
    dtype = dtype if dtype is not None else PROVIDERS[provider].dtypes[0]
    require_choice("--dtype", dtype, PRECISIONS)
    return Target.of(dtype, provider, block_size)


def _require_place(out: Path, inputs: dict[str, str | Path | None], force: bool) -> None:
    """inputs: by option, what is read and must not be replaced by the package."""
    require_utf8(out.absolute())
    require_writable(out, force)
    if force:
        require_apart(out, inputs)


def _beside(out: Path, ending: str) -> Path:
    place = Path(os.path.abspath(out))
    return place.with_name(place.name + ending)


def _key(
    source: Source, inputs: dict[str, str | Path | None], target: Target, asked: PruningSettings
) -> dict[str, Any]:
    """What a plan depends on, by the names that users know. inputs: by option, what is read. --device is not among it:
    what was made on one is good for another.
    """
    versions = {name: version(name) for name in ("popcompile", "torch", "transformers")}
    options = {f"--{name.replace('_', '-')}": value for name, value in asdict(asked).items()}
    read = {name: [str(given), stamps(given)] for name, given in inputs.items() if given is not None}
    fingerprint = {
        "config": source.fingerprint(),
        "--text-only": source.whole is not None,
        "--dtype": str(target.dtype),
    }
    return versions | options | read | fingerprint


@contextlib.contextmanager
def _structures_explained(source: Source) -> Iterator[None]:
    """A pass that does not find what it needs, in words about the model."""
    try:
        yield
    except ContractError as error:
        raise PopcompileError(
            f"{source.name}: {source.config.model_type} has a structure that popcompile does not know ({error});"
            " it supports decoders of attention and feed-forward layers"
        ) from error


def _require_kernels(source: Source, sizes: ModelSizes, target: Target) -> None:
    limit = target.attention.max_head_size
    if limit is not None and sizes.head_size > limit:
        raise PopcompileError(
            f"{source.name}: its heads have {sizes.head_size} features, and ONNX Runtime's attention takes at most"
            f" {limit} on {target.provider}; choose another --provider"
        )


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

    def prune_and_lower(self, plan: Plan, target: Target) -> dict[str, Any]:
        """Compile the canonical program as planned; returns the report."""
        maps, window = plan.calibration, plan.window
        self._program.constants.update(plan.constants())
        self.run(pruning(plan.pruned, maps.projections, maps.bypasses, window))
        prefill, decode = self._program.graphs["prefill"], self._program.graphs["decode"]
        table = layer_table(self._program, plan.pruned, window)
        flops: dict[str, Any] = {
            "reference_sizes": REFERENCE_SIZES,
            "full_prefill": total_flops(decode, "prefill"),
            "full_prefill_one_logit": full_prefill_one_logit(decode),
            "pop_prefill": total_flops(prefill, "prefill"),
            "decode": total_flops(decode, "decode"),
        }
        if "vision" in self._program.graphs:
            tokens, one = image_flops(self._program.graphs["vision"])
            flops["vision"] = {"image_tokens": tokens, "flops": one}
            self.run(target.image_lowering(), "lower")
        self.run(target.lowering(), "lower")
        return {"passes": [asdict(r) for r in self._records], "layers": table, "flops": flops, **plan.sections}
