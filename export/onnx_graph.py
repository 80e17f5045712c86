"""The lowered FX graphs of a program -> ONNX graphs. All decisions were made by passes; this writes them down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import fx

from popcompile.passes import Program
from popcompile.passes.graph import inputs_of, is_size

from .branches import choose_by_tokens
from .cached_attention import attend_to_prompts
from .foreign import write_foreign
from .image_attention import attend_to_images, forget_images
from .io_names import IMAGE_OUTPUTS, input_names, output_names
from .operators import RULES
from .providers import PROVIDERS
from .widen_products import widen_products
from .writer import Writer

#: that OPSET came with
_IR_VERSION = 10


def to_onnx(program: Program, stages: Iterable[str], provider: str) -> dict[str, ir.Model]:
    """The graphs of stages as ONNX models whose parameters have no value yet. provider: one of PROVIDERS.

    A graph whose attention is rewritten for several tokens becomes one of two branches, beside the whole model as it is
    for a single one (branches.py).
    """
    chosen = PROVIDERS[provider]
    decode = _written(program, "decode")
    one = decode.clone()
    forget_images(one)
    attend_to_prompts(one, None)  # one token needs none of it but for entries that no attention reads
    models = {}
    for stage in stages:
        model = decode.clone() if stage == "decode" else _written(program, stage)
        if attend_to_prompts(model, chosen.query_block) | attend_to_images(model, chosen.key_multiple):
            model = choose_by_tokens(one.clone(), model)
        if not chosen.fp16_products:
            widen_products(model)
        models[stage] = model
    return models


def images_to_onnx(program: Program, provider: str) -> dict[str, ir.Model]:
    """The graphs around a decoder, those that the program has, as ONNX models whose parameters have no value yet.

    Beside the embedding of text and images there is that of text alone. provider: one of PROVIDERS.
    """
    models = {}
    for stage, outputs in IMAGE_OUTPUTS.items():
        if stage in program.graphs:
            gm = program.graphs[stage]
            models[stage] = _model(gm, stage, list(inputs_of(gm)), outputs)
            if not PROVIDERS[provider].fp16_products:
                widen_products(models[stage])
    if "embedding" in models:
        models["text_embedding"] = _without_features(models["embedding"])
    return models


def _without_features(embedding: ir.Model) -> ir.Model:
    """The embedding before images' features take their places, for runtimes that put them there themselves."""
    model = embedding.clone()
    graph = model.graph
    scatter = graph.outputs[0].producer()
    assert scatter is not None and scatter.op_type == "ScatterND"
    text, _, features = scatter.inputs
    assert text is not None and features is not None
    text.name = graph.outputs[0].name
    graph.outputs[:] = [text]
    RemoveUnusedNodesPass()(model)
    graph.inputs.remove(features)
    return model


def _written(program: Program, stage: str) -> ir.Model:
    """The graph of a decoder's stage, written down."""
    layers = program.num_layers
    return _model(program.graphs[stage], stage, input_names(layers, program.inputs), output_names(layers))


def _model(gm: fx.GraphModule, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    model = ir.Model(write_graph(gm, name, inputs, outputs), ir_version=_IR_VERSION)
    for rewrite in (CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()):
        rewrite(model)
    return model


def write_graph(gm: fx.GraphModule, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Graph:
    """An FX graph as an ONNX graph with these names of inputs and outputs."""
    writer = Writer(gm, name, inputs)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            writer.parameter(node)
        elif node.op == "call_function" and not is_size(node):
            writer.write(node, RULES.get(node.target, write_foreign), otherwise=write_foreign)
    return writer.finish(gm, outputs)
