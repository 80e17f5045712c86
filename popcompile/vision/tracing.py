"""Trace the graphs around a vision-language model's decoder: its vision tower, and the embedding of tokens and images.

    vision      Qwen3-VL: pixel_values [patches, 3 * 2 * p * p], image_grid_thw [images, 3]
                Gemma-3:  pixel_values [images, 3, S, S]
                          -> image_features [tokens, W]
    embedding   input_ids [batch, sequence], image_features [tokens, W] -> inputs_embeds [batch, sequence, W]

Patches, images, tokens, batch and sequence are free. As of a decoder, no weights are needed, and parameters keep their
names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.export import Dim
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from popcompile.frontend.tracing import buffer_values, reporting
from popcompile.passes.base import Program
from popcompile.passes.fake_values import alike
from popcompile.passes.graph import DIMENSIONS, inputs_of, shape_of
from popcompile.upstream import FakeTensor, FakeTensorMode, export, rename
from popcompile.vision.embedding import Embedding
from popcompile.vision.towers import Input, embedding_width, vision_family


def build_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The vision-language model that `config` describes, whose parameters are fake tensors of `dtype`.

    Raises PopcompileError where transformers cannot build it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with reporting(config, "transformers cannot build the model from its config"), mode, no_init_weights():
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        model.tie_weights()
    return model


def trace_images(model: PreTrainedModel) -> Program:
    """Graphs "vision" and "embedding" of a Qwen3-VL or Gemma-3 model, whose parameters may be fake.

    The program's graphs and constants may be added to those of the model's decoder, which then shares the embedding
    table. Raises PopcompileError for other models.
    """
    family = vision_family(model.config)
    with reporting(model.config, "torch.export cannot trace its vision tower"):
        vision = _traced(model, family.tower(model), family.inputs(model.config))
    program = _program(model, "vision", vision)
    program.add(trace_embedding(model))
    return program


def trace_embedding(model: PreTrainedModel) -> Program:
    """Graph "embedding" alone, as of `trace_images`."""
    family, width = vision_family(model.config), embedding_width(model.config)
    embedding = Embedding(model, list(family.image_tokens(model.config).values()), width)
    with reporting(model.config, "torch.export cannot trace its embedding"):
        graph = _traced(model, embedding, _embedding_inputs(width, embedding.embed.weight.dtype))
    return _program(model, "embedding", graph)


def _embedding_inputs(width: int, dtype: torch.dtype) -> dict[str, Input]:
    return {
        "input_ids": Input((2, 5), torch.int64, {0: ("batch_size", 1), 1: ("sequence_length", 1)}),
        "image_features": Input((3, width), dtype, {0: ("num_image_tokens", 1)}),
    }


def _traced(model: PreTrainedModel, module: nn.Module, inputs: Mapping[str, Input]) -> fx.GraphModule:
    """The graph of a module whose parts are the model's, over the model's names of parameters."""
    graph = _exported(model, module, inputs)
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], inputs, strict=True):
        node.target = name
        rename(node, name)
    names = {part: name for name, part in model.named_modules()}
    places = {name: names[part] for name, part in module.named_children()}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        part, _, rest = node.target.partition(".")
        node.target = f"{places[part]}.{rest}"
    gm = fx.GraphModule(model, graph)
    gm.graph.eliminate_dead_code()
    gm.meta[DIMENSIONS] = {
        name: next(iter(shape_of(placeholder)[axis].node.expr.free_symbols))
        for placeholder, each in zip(inputs_of(gm).values(), inputs.values(), strict=True)
        for axis, (name, _) in each.free.items()
    }
    return gm


def _exported(model: PreTrainedModel, module: nn.Module, inputs: Mapping[str, Input]) -> fx.Graph:
    """What torch.export makes of a module, flat."""
    dims = {name: Dim(name) for each in inputs.values() for name, _ in each.free.values()}
    shapes = tuple(
        {axis: times * dims[name] if times > 1 else dims[name] for axis, (name, times) in each.free.items()}
        for each in inputs.values()
    )
    parameter = next(model.parameters())
    with parameter.fake_mode if isinstance(parameter, FakeTensor) else contextlib.nullcontext():
        arguments = tuple(torch.zeros(each.shape, dtype=each.dtype) for each in inputs.values())
    with torch.no_grad():
        exported = export(module, arguments, shapes, alike)
    graph = exported.module(check_guards=False).graph
    graph.set_codegen(fx.graph.CodeGen())
    return graph


def _program(model: PreTrainedModel, name: str, gm: fx.GraphModule) -> Program:
    """Of one graph, with the values of the buffers that it reads and no checkpoint holds."""
    known = dict(model.named_buffers())
    if any(isinstance(value, FakeTensor) for value in known.values()):
        known = buffer_values(model, model)
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    constants = {buffer: value for buffer, value in known.items() if buffer in read}
    return Program({name: gm}, num_layers=0, max_positions=0, constants=constants)
