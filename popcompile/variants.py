"""Variants of a package over its own weights: other layers pruned, dropped in both stages, or with the full model.

The model is traced once more from the package's config.json; the package has every weight that a variant needs. A
variant is a package of its own, with hard links where its files are the same.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import GraphProto

from popcompile.errors import PopcompileError
from popcompile.export.onnx_graph import to_onnx
from popcompile.export.weights import Placement, point_to_file
from popcompile.frontend.tracing import trace
from popcompile.loading import reading
from popcompile.package.configs import read_config
from popcompile.package.graph_check import read_graphs
from popcompile.package.integrity import check_small_files, open_weights
from popcompile.package.manifest import LAYOUTS, MANIFEST, describe_files, read_manifest
from popcompile.package.staging import link_or_copy
from popcompile.passes import Pass, PassManager, Program, canonicalization, pruning
from popcompile.passes.drop_layers import DropLayers
from popcompile.passes.graph import find
from popcompile.passes.pack_qkv import PARTS, packed_name, part_features
from popcompile.passes.prune_lm_head import PruneLMHead
from popcompile.passes.split_stages import SplitStages
from popcompile.target import Target
from popcompile.vision.tracing import build_model, trace_embedding


class Variants:
    """Compiles variants of one package; tracing and canonicalization run once."""

    def __init__(self, package: Path) -> None:
        """Raises PopcompileError where the package's model cannot be traced again."""
        self.package = package.resolve()
        self.manifest = read_manifest(package)
        manifest = self.manifest
        self._target = Target.of(manifest.dtype, manifest.provider, manifest.block_size)
        check_small_files(self.package, manifest)
        config = read_config(self.package, manifest)
        with reading(str(package), "its model cannot be compiled again from config.json"):
            self._program = trace(config, self._target.dtype)
            if manifest.images is not None:  # an embedding that is tied to the LM head decides how that is stored
                self._program.add(trace_embedding(build_model(config, self._target.dtype)))
            PassManager(canonicalization()).run(self._program)
        with open_weights(self.package, manifest) as file:
            self._weights = np.memmap(file, np.uint8, "r")
        model = self._program.graphs["model"]
        #: by parameter, which part of the packed one it is
        self._parts = {
            str(parameter.target): role
            for role in PARTS
            for projection in find(model, role=role)
            for parameter in projection.all_input_nodes[1:]
        }
        self._placements: dict[str, Placement] = {}
        for _, graph in read_graphs(self.package, manifest).values():
            self._placements |= _placements(graph)

    def prune(self, out: Path, layers: Iterable[int]) -> Path:
        """The package with `layers` pruned in prefill, their K/V made with the layers' own weights; written to `out`.

        `out` must not exist.
        """
        layers = sorted(set(layers))
        return self._write(
            out, ("prefill",), pruning(layers, window=self.manifest.window), pruned=layers, kv_projection="layer"
        )

    def drop(self, out: Path, layers: Iterable[int]) -> Path:
        """The package without `layers`, in prefill and in decode; written to `out`, which must not exist."""
        layers = sorted(set(layers))
        passes = [SplitStages(), DropLayers(layers), PruneLMHead()]
        return self._write(out, tuple(self.manifest.stages), passes, pruned=layers, kv_projection="layer")

    def complete(self, out: Path) -> Path:
        """The package with a graph of the full model, which the unified layout leaves out; written to `out`, which must
        not exist.
        """
        graphs = self.manifest.graphs | {"decode": LAYOUTS["split"].graphs["decode"]}
        return self._write(out, ("decode",), pruning([]), layout="split", graphs=graphs)

    def _write(self, out: Path, stages: tuple[str, ...], passes: list[Pass], **changes: Any) -> Path:
        """Run `passes` and write the graphs of `stages`, beside links to the package's other files.

        changes: of the manifest.
        """
        program = self._program.clone()
        PassManager([*passes, *self._target.image_lowering(), *self._target.lowering()]).run(program)
        manifest = replace(self.manifest, **changes)
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
        for stage, model in to_onnx(program, stages, manifest.provider).items():
            self._unpack_projections(model, program)
            point_to_file(model, out / manifest.weights, self._placements)
            ir.save(model, out / manifest.graphs[stage])
        known = {name: str(file["sha256"]) for name, file in manifest.files.items() if name not in changed}
        same = {name: manifest.files[name] for name in known}
        manifest = replace(manifest, files=describe_files(out, manifest.weights, known) | same)
        (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return out

    def _unpack_projections(self, model: ir.Model, program: Program) -> None:
        """Give the graph the projections that only this variant reads on their own.

        The package keeps every layer's query, key and value projection side by side, in one initializer.
        """
        kv_size = self.manifest.num_kv_heads * self.manifest.head_size
        for name, value in model.graph.initializers.items():
            if value.const_value is not None or name in self._placements:
                continue
            source = program.derived[name].sources[0] if name in program.derived else name
            if (packed := packed_name(name)) not in self._placements:
                raise PopcompileError(f"{self.package}: its graphs read no {packed}; convert the model again")
            place = self._placements[packed]
            assert value.dtype is not None and value.shape is not None
            dtype, shape = value.dtype.numpy(), list(value.shape.numpy())
            features = -1 if self._target.quantization is None else 0  # the dimension of output features
            shape[features] = -1
            data = self._weights[place.offset : place.offset + place.length].view(dtype).reshape(shape)
            part = part_features(self._parts[source], data.shape[features], kv_size)
            cut = data[..., part] if features == -1 else data[part]
            value.const_value = ir.tensor(np.ascontiguousarray(cut), name=name)


@contextlib.contextmanager
def with_full_model(package: Path) -> Iterator[Path]:
    """The package itself or, while the block runs, a variant of it: one that has a graph of the full model."""
    if "decode" in read_manifest(package).graphs:
        yield package
        return
    with tempfile.TemporaryDirectory(prefix="popcompile-", ignore_cleanup_errors=True) as temporary:
        yield Variants(package).complete(Path(temporary) / "package")


def _placements(graph: GraphProto) -> dict[str, Placement]:
    """Where the package keeps the weights of the unchanged model, by initializer."""
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    return {name: Placement(int(e["offset"]), int(e["length"])) for name, e in entries.items()}
