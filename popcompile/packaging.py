"""Write a compiled program as a package: graphs, weights, configs and manifest."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from popcompile.errors import PopcompileError
from popcompile.export.genai_config import genai_config
from popcompile.export.genai_images import PROCESSOR, genai_processor
from popcompile.export.io_names import input_names, output_names
from popcompile.export.onnx_graph import images_to_onnx, to_onnx
from popcompile.export.weights import WeightError, data_size, pending_initializers, write_weights
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.decoders import architecture
from popcompile.frontend.processor_files import processor_settings
from popcompile.frontend.source import Source
from popcompile.package.graph_check import read_graphs
from popcompile.package.image_inputs import ImageInputs
from popcompile.package.integrity import CODE_FIELDS
from popcompile.package.manifest import (
    FORMAT_VERSION,
    IMAGE_LAYOUTS,
    LAYOUTS,
    MANIFEST,
    REPORT,
    Manifest,
    describe_files,
)
from popcompile.package.staging import require_disk_space
from popcompile.passes import Program
from popcompile.passes.graph import find, outputs_of, shape_of
from popcompile.passes.ops import append_kv
from popcompile.progress import Progress
from popcompile.pruning.plan import Plan
from popcompile.target import Target
from popcompile.vision.inputs import image_inputs


class PackageWriter:
    """Writes a package's files into a folder, the manifest last."""

    def __init__(
        self,
        folder: Path,
        layout: str,
        source: Source,
        adapter: Adapter | None,
        checkpoint: Checkpoint,
        target: Target,
        progress: Progress,
    ) -> None:
        """layout: a name in LAYOUTS. adapter: what is merged into the weights. target: what graphs are lowered for."""
        self._folder, self._layout = folder, layout
        self._files = (IMAGE_LAYOUTS if source.has_images else LAYOUTS)[layout]
        self._source, self._adapter, self._checkpoint = source, adapter, checkpoint
        self._target, self._progress = target, progress
        self._hashes: dict[str, str] = {}
        #: of what was written; None for a model of text alone
        self._images: ImageInputs | None = None

    def write_model(self, program: Program) -> None:
        """Graphs and weights of a lowered program. Raises PopcompileError where the checkpoint's do not fit."""
        self._progress("export", 0, 1)
        around = images_to_onnx(program, self._target.provider)
        decoders = [stage for stage in self._files.graphs if stage not in around]
        made = to_onnx(program, decoders, self._target.provider) | around
        models = {stage: made[stage] for stage in self._files.graphs}
        self._images = image_inputs(self._source.config, program) if self._source.has_images else None
        self._hashes[self._files.weights] = self._write_weights(models, program)
        for stage, file in self._files.graphs.items():
            ir.save(models[stage], self._folder / file)

    def _write_weights(self, models: dict[str, ir.Model], program: Program) -> str:
        """Write the data file; returns its SHA-256."""
        file, size, written = self._folder / self._files.weights, data_size(pending_initializers(models)), 0
        require_disk_space(self._folder, size)

        def count(_: str, length: int) -> None:
            nonlocal written
            written += length
            self._progress("weights", written, size)

        try:
            return str(write_weights(file, models, program, self._checkpoint.read, count)["sha256"])
        except WeightError as error:
            raise PopcompileError(
                f"{self._source.name}: {error}; fix the checkpoint or choose another --dtype"
            ) from error

    def write_configs(self, sizes: ModelSizes) -> None:
        """What transformers and onnxruntime-genai read beside the graphs, the tokenizer's files included."""
        source = self._source
        source.config.save_pretrained(self._folder)
        source.generation_config.save_pretrained(self._folder)
        source.save_tokenizer(self._folder)
        if self._images is not None:
            self._write_processor(self._images)
        _leave_out_code(self._folder)
        config = genai_config(
            source.config,
            source.generation_config,
            graphs=self._files.graphs,
            head_size=sizes.head_size,
            kv_heads=sizes.kv_heads,
            vocab_size=sizes.vocab_size,
            provider=self._target.provider,
            images=self._images,
        )
        _write_json(self._folder / "genai_config.json", config)

    def _write_processor(self, images: ImageInputs) -> None:
        """What makes pixels of pictures, in transformers' files and in genai's."""
        files = self._source.processor_files()
        for name, content in files.items():
            _write_json(self._folder / name, content)
        if files and (operations := genai_processor(processor_settings(self._source.name, self._folder), images)):
            _write_json(self._folder / PROCESSOR, operations)

    def write_report(self, report: dict[str, Any]) -> None:
        _write_json(self._folder / REPORT, report)

    def write_manifest(self, program: Program, plan: Plan, sizes: ModelSizes) -> Manifest:
        """Describe the files that are there. Raises PopcompileError where they are none that packages may have."""
        target = self._target
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            popcompile=version("popcompile"),
            source=self._described(),
            model_type=self._source.config.model_type,
            num_layers=program.num_layers,
            num_kv_heads=sizes.kv_heads,
            head_size=sizes.head_size,
            vocab_size=sizes.vocab_size,
            context_length=program.max_positions,
            pruned=plan.pruned,
            kv_projection="calibrated" if plan.calibration.projections else "layer",
            dtype=target.precision,
            block_size=target.quantization.block_size if target.quantization else 0,
            provider=target.provider,
            layout=self._layout,
            window=plan.window if plan.pruned else 1,
            graphs=self._files.graphs,
            weights=self._files.weights,
            inputs=input_names(program.num_layers, program.inputs),
            outputs=output_names(program.num_layers),
            versions=_versions(),
            vision={} if self._images is None else asdict(self._images),
        )
        manifest = replace(manifest, files=describe_files(self._folder, self._files.weights, self._hashes))
        (self._folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        self._require_readable(manifest)
        return manifest

    def _described(self) -> dict[str, str]:
        """What the manifest says of the model."""
        source, adapter = self._source, self._adapter
        described = {"name": source.name, "kind": source.kind, **source.fingerprint()}
        if source.whole is not None:
            described["text_decoder_of"] = architecture(source.whole)
        return described | ({"adapter": adapter.name, "adapter_sha256": adapter.sha256} if adapter else {})

    def _require_readable(self, manifest: Manifest) -> None:
        """What every use of the package checks: what an architecture is exported with, and what packages may have, are
        two lists.
        """
        try:
            read_graphs(self._folder, manifest)
        except PopcompileError as error:
            what = str(error).removeprefix(f"{self._folder}: ").partition(";")[0]
            raise PopcompileError(
                f"{self._source.name}: {manifest.model_type} is exported with operators that packages may not have"
                f" ({what}); report it"
            ) from error


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that configs and manifest need, read from the traced graph. head_size: as the package's graphs have it."""

    kv_heads: int
    head_size: int
    vocab_size: int

    @classmethod
    def of(cls, program: Program, target: Target) -> ModelSizes:
        """program: canonical or before."""
        graph = program.graphs["model"]
        cache = shape_of(find(graph, op=append_kv)[0])
        vocab_size = int(shape_of(outputs_of(graph)[0])[2])
        return cls(int(cache[1]), target.attention.padded(int(cache[3])), vocab_size)


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
    import onnxruntime  # under one of several names of distributions

    return str(onnxruntime.__version__)
