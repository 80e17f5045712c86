"""Variants of a package over its own weights: other layers pruned, or dropped in both stages.

The model is traced once more from the package's config.json; of the package's weights every initializer that a variant
needs is there already. A variant is a package of its own, with hard links where its files are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
from transformers import AutoConfig

from popcompile.conversion import DTYPES
from popcompile.errors import PopcompileError
from popcompile.export.onnx_graph import to_onnx
from popcompile.export.weights import Placement, point_to_file
from popcompile.loading import quiet, reading
from popcompile.package import MANIFEST, describe_files, read_manifest
from popcompile.passes import Pass, PassManager, Program, canonicalization, lowering, pruning
from popcompile.passes.drop_layers import DropLayers
from popcompile.passes.graph import clone_module
from popcompile.passes.prune_lm_head import PruneLMHead
from popcompile.passes.split_stages import SplitStages
from popcompile.staging import link_or_copy
from popcompile.tracing import trace


class Variants:
    """Compiles variants of one package; tracing and canonicalization run once."""

    def __init__(self, package: Path) -> None:
        """Raises PopcompileError where the package's model cannot be traced again."""
        self.package = package.resolve()
        self.manifest = read_manifest(package)
        if self.manifest.dtype not in DTYPES:
            raise PopcompileError(
                f"{package}: variants of a package in {self.manifest.dtype} cannot be compiled; convert the model in"
                f" {' or '.join(DTYPES)} for them"
            )
        with quiet(), reading(str(package), "config.json does not load"):
            config = AutoConfig.from_pretrained(self.package, local_files_only=True)
        self._program = trace(config, DTYPES[self.manifest.dtype])
        PassManager(canonicalization()).run(self._program)
        self._placements = _placements(self.package / self.manifest.graphs["decode"])

    def prune(self, out: Path, layers: Iterable[int]) -> Path:
        """The package with `layers` pruned in prefill, their K/V made with the layers' own weights; written to `out`.

        `out` must not exist.
        """
        layers = sorted(set(layers))
        return self._write(out, layers, ("prefill",), pruning(layers))

    def drop(self, out: Path, layers: Iterable[int]) -> Path:
        """The package without `layers`, in prefill and in decode; written to `out`, which must not exist."""
        layers = sorted(set(layers))
        return self._write(out, layers, ("prefill", "decode"), [SplitStages(), DropLayers(layers), PruneLMHead()])

    def _write(self, out: Path, layers: list[int], stages: tuple[str, ...], passes: list[Pass]) -> Path:
        """Run `passes` and write the graphs of `stages`, beside links to the package's other files."""
        program = self._copy()
        PassManager([*passes, *lowering()]).run(program)
        manifest = self.manifest
        changed = {manifest.graphs[stage] for stage in stages}
        try:
            for name in sorted(set(manifest.files) - changed):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(self.package / name, out / name)
        except OSError as error:
            raise PopcompileError(
                f"{out}: the package's files cannot be put there ({error.strerror}); set TMPDIR to a folder on the disk"
                " that the package is on"
            ) from error
        for stage in stages:
            model = to_onnx(program.graphs[stage], program.num_layers, stage, manifest.provider)
            point_to_file(model, out / manifest.weights, self._placements)
            ir.save(model, out / manifest.graphs[stage])
        known = {name: str(file["sha256"]) for name, file in manifest.files.items() if name not in changed}
        manifest = replace(manifest, pruned=layers, kv_projection="layer", files=describe_files(out, known))
        (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return out

    def _copy(self) -> Program:
        """The canonical program, free to be changed."""
        program = self._program
        graphs = {stage: clone_module(gm) for stage, gm in program.graphs.items()}
        return replace(program, graphs=graphs, derived=dict(program.derived))


def _placements(graph: Path) -> dict[str, Placement]:
    """Where the package keeps the weights of the unchanged model, by initializer."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in tensors if t.external_data}
    return {name: Placement(int(e["offset"]), int(e["length"])) for name, e in entries.items()}
