"""The lowered FX graphs of a program -> ONNX graphs.

All decisions were made by passes; this file writes the graphs down with torch.onnx. Parameters are fake tensors and
come out as initializers without a value, which weights.py then points into the package's external data file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    ShapeInferencePass,
)
from torch import fx

from popcompile.passes import Program
from popcompile.passes.graph import clone_module, inputs_of, shape_of, value_of
from popcompile.passes.ops import REFERENCE
from popcompile.quiet import errors_only
from popcompile.upstream import FakeTensorMode, own_tensors

from .branches import choose_by_tokens
from .cached_attention import attend_to_prompts
from .io_names import input_names, output_names
from .providers import PROVIDERS
from .shapes import settle_shapes
from .widen_products import widen_products

OPSET = 21


def to_onnx(program: Program, stages: Iterable[str], provider: str) -> dict[str, ir.Model]:
    """The graphs of stages as ONNX models whose parameters have no value yet. provider: one of PROVIDERS.

    A graph whose attention is rewritten for several tokens becomes one of two branches, beside the whole model as it is
    for a single one (branches.py).
    """
    chosen = PROVIDERS[provider]
    decode = _export(program, "decode")
    one = decode.clone()
    attend_to_prompts(one, None)  # one token needs none of it but for entries that no attention reads
    models = {}
    for stage in stages:
        model = decode.clone() if stage == "decode" else _export(program, stage)
        if attend_to_prompts(model, chosen.query_block):
            model = choose_by_tokens(one.clone(), model)
        if not chosen.fp16_products:
            widen_products(model)
        models[stage] = model
    return models


def _export(program: Program, stage: str) -> ir.Model:
    """The graph of a stage, written down."""
    gm, num_layers = program.graphs[stage], program.num_layers
    with _quiet():
        exported = _reexport(gm)
        onnx_program = torch.onnx.export(
            exported,
            input_names=input_names(num_layers),
            output_names=output_names(num_layers),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert onnx_program is not None
        model: ir.Model = onnx_program.model
        model.graph.name = stage
        parameters = {n: v for n, v in model.graph.initializers.items() if _is_fake(v.const_value)}
        for value in parameters.values():
            value.const_value = None
        settle_shapes(model)
        for rewrite in (
            CommonSubexpressionEliminationPass(),
            IdentityEliminationPass(),
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            RemoveUnusedNodesPass(),
            RemoveUnusedOpsetsPass(),
        ):
            rewrite(model)
    _name_nodes(model)
    NameFixPass()(model)
    with _quiet():
        _infer_types(model)
    _leave_out_statistics(model)
    _name_dimensions(model)
    return model


def _reexport(gm: fx.GraphModule) -> torch.export.ExportedProgram:
    """Trace the lowered graph once more: operators of our own vocabulary dissolve into their reference code."""
    gm = clone_module(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in REFERENCE:
            node.target = REFERENCE[node.target]
    gm.recompile()
    mode = FakeTensorMode()
    for module in gm.modules():
        for key, tensor in own_tensors(module).items():
            if tensor is not None:
                delattr(module, key)
                with mode:
                    module.register_buffer(key, torch.empty(tuple(tensor.shape), dtype=tensor.dtype))
    inputs = list(inputs_of(gm).values())
    dims: dict[Any, torch.export.Dim] = {}
    arguments, shapes = [], []
    for node in inputs:
        symbols = {i: d for i, d in enumerate(shape_of(node)) if isinstance(d, torch.SymInt)}
        shapes.append({i: dims.setdefault(str(d), torch.export.Dim(f"d{len(dims)}")) for i, d in symbols.items()})
        sizes = [3 + list(dims).index(str(d)) if i in symbols else d for i, d in enumerate(shape_of(node))]
        with mode:
            arguments.append(torch.zeros(sizes, dtype=value_of(node).dtype))
    with torch.no_grad():
        return torch.export.export(gm, tuple(arguments), dynamic_shapes=tuple(shapes), strict=False)


def _is_fake(value: Any) -> bool:
    return isinstance(getattr(value, "raw", None), torch.Tensor) and type(value.raw).__name__ != "Tensor"


def _infer_types(model: ir.Model) -> None:
    """Say the types that torch.onnx leaves open, of what its functions compute in between: a package's check asks."""
    unknown = [v for node in model.graph for v in node.outputs if v.name and v.type is None]
    if not unknown:
        return
    inferred = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(inferred)
    types = {value.name: value.type for node in inferred.graph for value in node.outputs}
    for value in unknown:
        value.type = types[value.name]


def _leave_out_statistics(model: ir.Model) -> None:
    """SkipSimplifiedLayerNormalization's mean and inverse deviation are for training; no kernel here computes them."""
    for node in model.graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for value in node.outputs:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""


def _name_nodes(model: ir.Model) -> None:
    """Name nodes by where they live: /model/layers.3/self_attn/q_proj/MatMul."""
    used: dict[str, int] = {}
    for node in model.graph:
        scopes = [s for s in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))[:-1] if s]
        path = (scopes[-1] if scopes else "").removeprefix("decoder").strip(".")
        parts: list[str] = []
        for part in path.split(".") if path and "empty_nn_module" not in path else []:
            if part.isdigit() and parts:
                parts[-1] += f".{part}"
            else:
                parts.append(part)
        name = "/" + "/".join([*parts, node.op_type])
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name] - 1}"
        node.metadata_props.clear()
        node.doc_string = None


def _name_dimensions(model: ir.Model) -> None:
    """Free dimensions under the names that runtimes and their users know."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        free = {
            "input_ids": ("batch_size", "sequence_length"),
            "attention_mask": ("batch_size", "total_sequence_length"),
        }
        for dim, name in zip(
            value.shape, free.get(value.name or "", ("batch_size", "", "past_sequence_length", "")), strict=True
        ):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names[dim.value] = name

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, ir.SymbolicDim) or not dim.value:
            return dim
        return " + ".join(names.get(term, term) for term in dim.value.split(" + "))

    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([renamed(d) for d in value.shape])
    for value in model.graph.inputs:
        value.shape = ir.Shape([renamed(d) for d in value.shape or ()])
    for value in model.graph.outputs:
        if value.name != "logits":
            assert value.shape is not None
            value.shape = ir.Shape(["batch_size", value.shape[1], "total_sequence_length", value.shape[3]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.onnx's progress lines, its warnings about missing packages, and the logs of what it is built on."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        errors_only("torch.onnx", "onnxscript", "onnx_ir"),
    ):
        yield
