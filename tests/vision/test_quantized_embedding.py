"""Of a vision-language model whose decoder is quantized the embedding reads the table that the LM head multiplies with.

Of Gemma-3 it is scaled; the image token is one beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from rounded_weights import rounded
from vision import close, random_model, tiny_gemma3_vision, tiny_qwen3_vl

from popcompile.export.onnx_graph import images_to_onnx, to_onnx
from popcompile.export.weights import ALIGNMENT, write_weights
from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, Quantization, canonicalization, image_lowering, lowering, pruning
from popcompile.vision.tracing import build_model, trace_images

TABLE = "model.language_model.embed_tokens.weight"
SCHEMES = {
    "int4": Quantization(bits=4, block_size=16),
    "w8a8": Quantization(bits=8, block_size=32, dynamic=True),
}


@cache
def traced(family: str, tied: bool = True) -> tuple[Any, Program]:
    """A model, and its canonical program, to be cloned."""
    config = tiny_qwen3_vl() if family == "qwen" else tiny_gemma3_vision(image_token=100)
    config.tie_word_embeddings = tied
    model, program = random_model(config), trace(config)
    program.add(trace_images(build_model(config)))
    PassManager([*canonicalization(), *pruning([])]).run(program)
    return model, program


@dataclass
class Compiled:
    """Graphs by stage, and the weights file that they share, which has the tensors of `model`."""

    model: Any
    graphs: Mapping[str, ir.Model]
    weights: Path

    @classmethod
    def of(cls, model: Any, program: Program, quantization: Quantization, folder: Path) -> Compiled:
        program, weights = program.clone(), folder / "weights.onnx.data"
        PassManager([*image_lowering(quantization), *lowering(quantization)]).run(program)
        graphs = to_onnx(program, ["decode"], "cpu") | images_to_onnx(program, "cpu")
        write_weights(weights, graphs, program, model.state_dict().__getitem__)
        return cls(model, graphs, weights)

    @property
    def table(self) -> torch.Tensor:
        return self.model.get_input_embeddings().weight.detach()

    def embed(self, ids: torch.Tensor, features: np.ndarray) -> np.ndarray:
        file = self.weights.with_name("embedding.onnx")
        ir.save(self.graphs["embedding"], file)
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"input_ids": ids.numpy(), "image_features": features})[0])

    def places(self, stage: str) -> dict[str, tuple[int, int]]:
        """Offset and length in the weights file of what a graph reads of it, by name."""
        tensors = {name: value.const_value for name, value in self.graphs[stage].graph.initializers.items()}
        return {n: (t.offset, t.length) for n, t in tensors.items() if isinstance(t, ir.ExternalTensor)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_rows_are_those_of_the_rounded_table(family: str, scheme: str, tmp_path: Path) -> None:
    """Those of image tokens are the images' features as they are. The table is stored once, and only in blocks."""
    quantization = SCHEMES[scheme]
    compiled = Compiled.of(*traced(family), quantization, tmp_path)
    width = 64 * 3 if family == "qwen" else 64 + 1
    features = np.random.default_rng(0).standard_normal((2, width), np.float32)
    ids, text = torch.tensor([[2, 5, 95], [80, 0, 7]]), np.array([[True, True, False], [True, False, True]])
    ids[~torch.tensor(text)] = compiled.model.config.image_token_id
    found = compiled.embed(ids, features)
    scale = getattr(compiled.model.get_input_embeddings(), "embed_scale", torch.tensor(1.0))
    assert (float(scale) != 1) == (family == "gemma")
    words = ids[torch.tensor(text)]
    expected = rounded(compiled.table, quantization.bits, quantization.block_size)[words] * scale
    assert close(found[text][:, :64], expected, tolerance=1e-6)
    assert not close(found[text][:, :64], compiled.table[words] * scale, tolerance=1e-3)
    assert not found[text][:, 64:].any() and (found[~text] == features).all()

    blocks, places = f"{TABLE}_int{quantization.bits}", {stage: compiled.places(stage) for stage in compiled.graphs}
    assert places["embedding"][blocks] == places["decode"][blocks]
    names = {name for read in places.values() for name in read if name.startswith(TABLE)}
    assert not any("_int" in name for name in places["vision"])
    assert names == {blocks, f"{TABLE}_scales", f"{TABLE}_scales_of_rows"}
    lengths = dict(place for read in places.values() for place in read.values()).values()
    assert compiled.weights.stat().st_size <= sum(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)


@pytest.mark.parametrize(("tied", "block_size"), [(False, 32), (True, 128)])
def test_where_the_table_stays_as_it_is(tied: bool, block_size: int, tmp_path: Path) -> None:
    """As in a model of text: where the head has a weight of its own, and where blocks do not divide a row."""
    compiled = Compiled.of(*traced("qwen", tied), Quantization(bits=8, block_size=block_size), tmp_path)
    ids = torch.tensor([[2, 5, 95]])
    found = compiled.embed(ids, np.zeros((0, 192), np.float32))
    assert close(found[..., :64], compiled.table[ids], tolerance=0)
    assert (TABLE in compiled.places("embedding")) and TABLE not in compiled.places("decode")
