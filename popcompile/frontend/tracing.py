"""Trace a Hugging Face decoder into one flat FX graph, without its weights.

The model is built from its config with fake tensors, so time and memory do not depend on its size. Attention, the
cache update and a layer's experts are registered with transformers' own extension points and stay single nodes;
torch.export keeps batch, sequence and past length free. Parameters keep their names.

    inputs   input_ids [batch, sequence], attention_mask [batch, total], or what a vision-language model's decoder takes
             in their place (token_inputs.py), past_key_values.N.key / .value [batch, kv_heads, past, head]
    outputs  logits [batch, sequence, vocabulary], present.N.key / .value [batch, kv_heads, total, head]
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface

from popcompile.errors import PopcompileError
from popcompile.frontend.masks import SUPPORTED, Mask, causal_mask
from popcompile.frontend.positions import context_length, require_positions, require_positions_from_zero
from popcompile.frontend.token_inputs import TokenInputs, decoder_config, token_inputs
from popcompile.loading import one_line
from popcompile.passes import ops
from popcompile.passes.base import Program
from popcompile.passes.fake_values import alike
from popcompile.upstream import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    LazyGraphModule,
    computed_buffers,
    export,
    has_default_gate,
    has_gpt_oss_gate,
    initialize_buffers,
    remember,
    rename,
    set_buffer,
)

#: what transformers knows the functions below as
_IMPLEMENTATION = "popcompile"
#: the one activation of experts that are compiled, by the names that configs give it
_SILU = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))
#: arguments of attention functions that change nothing of what they compute
_IGNORED = {
    *("position_ids", "cache_position", "use_cache", "cache", "past_key_values", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "return_dict", "deterministic", "target_dtype"),
}


class _Slots(NamedTuple):
    """Of the new tokens, [B, S] each: their own in the cache, and the last that they see where that is another."""

    positions: torch.Tensor
    ends: torch.Tensor | None


#: those of the traced module, for the functions below that transformers calls without them
_slots: list[_Slots] = []


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, D] and the cache -> [B, S, H, D].

    The window is the mask's, which is what attention does in transformers; `sliding_window` repeats it for kernels.
    s_aux: attention sinks [H].
    """
    window = attention_mask.window if isinstance(attention_mask, Mask) else 0
    if not isinstance(attention_mask, Mask) or is_causal is False:
        raise PopcompileError(f"{type(module).__name__} takes a mask of its own, or none; {SUPPORTED}")
    unknown = [name for name, given in others.items() if name not in _IGNORED and given is not None]
    if unknown:
        raise PopcompileError(
            f"{type(module).__name__} gives attention {unknown[0]}, which is not supported; {SUPPORTED}"
        )
    positions, ends = _slots[-1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    sinks = () if s_aux is None else (s_aux,)
    beyond = {"ends": ends} if attention_mask.shows_images else {}
    out = ops.attention(query, key, value, positions, float(scale), window, float(softcap or 0.0), *sinks, **beyond)
    return out.transpose(1, 2), None


AttentionInterface.register(_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_IMPLEMENTATION, causal_mask)


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden_states [N, hidden], top_k_index and top_k_weights [N, k]."""
    stored = {name for name, _ in module.named_parameters()}
    matrices, biases = {"gate_up_proj", "down_proj"}, {"gate_up_proj_bias", "down_proj_bias"}
    gate = _gate(module)
    if gate is None or stored not in (matrices, matrices | biases):
        raise PopcompileError(
            f"{type(module).__name__} has other experts than popcompile supports: SwiGLU blocks, with hidden_act silu"
            " or as in gpt-oss"
        )
    gate_up, down = module.gate_up_proj, module.down_proj
    added = [module.gate_up_proj_bias, module.down_proj_bias] if stored > matrices else [None, None]
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not module.is_concatenated:  # a row of gate, one of up, and so on
        gate_up, added[0] = (t if t is None else torch.cat((t[:, ::2], t[:, 1::2]), 1) for t in (gate_up, added[0]))
    plain = added == [None, None] and gate == (1.0, 0.0, 0.0)
    return ops.experts(hidden_states, gate_up, down, top_k_index, top_k_weights, *(() if plain else (*added, *gate)))


def _gate(module: Any) -> tuple[float, float, float] | None:
    """alpha, shift and limit of experts' SwiGLU (ops.experts), or None where they have another gate."""
    if has_default_gate(module) and module.is_concatenated and isinstance(module.act_fn, _SILU):
        return 1.0, 0.0, 0.0
    if has_gpt_oss_gate(module) and not module.is_concatenated:
        return float(module.alpha), 1.0, float(module.limit)
    return None


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts)


_COMPLEX = (torch.complex64, torch.complex128)
#: what a model is said to be that is none of those that are supported
NOT_TRACED = (
    "torch.export cannot trace this model, and popcompile supports decoders whose layers are attention and feed-forward"
    " blocks"
)


class _TracedLayer(DynamicLayer):
    """One layer's cache: grows by one append_kv node each for key and value."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.past_key, self.past_value = key, value
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions = _slots[-1].positions
        self.keys = ops.append_kv(self.past_key, key_states, positions)
        self.values = ops.append_kv(self.past_value, value_states, positions)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.past_key.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past_key.shape[2] + query_length, 0


class _Decoder(torch.nn.Module):
    """The model with flat inputs and outputs."""

    def __init__(self, model: PreTrainedModel, inputs: TokenInputs) -> None:
        super().__init__()
        self.decoder, self.inputs = model, inputs

    def forward(self, given: list[torch.Tensor], past: list[torch.Tensor]) -> Any:
        """given: tokens, attention_mask, and what else `inputs` names."""
        tokens, attention_mask = given[:2]
        positions = ops.token_positions(attention_mask, tokens)
        layers = [_TracedLayer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)]
        is_image = self.inputs.is_image(given)
        ends = None if is_image is None else ops.image_ends(is_image, positions, attention_mask)
        _slots.append(_Slots(positions, ends))
        try:
            logits = self.inputs.logits(self.decoder, given, positions, Cache(layers=list(layers)))
        finally:
            _slots.pop()
        return logits, [t for layer in layers for t in (layer.keys, layer.values)]


def trace(config: PretrainedConfig, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Program:
    """Trace the decoder that `config` describes; parameters are fake tensors of `dtype`.

    Of a vision-language model it is the text decoder, whose parameters have the names that they have in the whole.
    Raises PopcompileError where the model cannot be built from its config or traced.
    """
    config = copy.deepcopy(config)  # building a model writes to its config
    require_positions(decoder_config(config))
    return _traced(config, dtype, trust_remote_code)


def _traced(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Program:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs, text = token_inputs(config), decoder_config(config)
    with reporting(config, "transformers cannot build the model from its config"), mode, no_init_weights():
        model = inputs.build(
            config,
            attn_implementation=_IMPLEMENTATION,
            experts_implementation=_IMPLEMENTATION,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        ).eval()
        model.tie_weights()  # which is a part of their initialization
    require_positions_from_zero(text, model)
    layers = text.num_hidden_layers
    decoder = _Decoder(model, inputs)
    with reporting(config, NOT_TRACED), torch.no_grad():
        with mode:
            with _restoring(model):
                heads, head_size = _cache_shape(text, decoder(*_arguments(inputs, dtype, layers, 1, 1))[1])
            arguments = _arguments(inputs, dtype, layers, heads, head_size)
        batch, sequence, total, past = map(torch.export.Dim, ("batch", "sequence", "total", "past"))
        shapes = (inputs.dimensions(batch, sequence, total), [{0: batch, 2: past} for _ in range(2 * layers)])
        exported = export(decoder, arguments, shapes, alike)
        gm = _flat(exported.module(check_guards=False), inputs.names, layers)
        constants = {
            name.removeprefix("decoder."): value
            for name, value in exported.constants.items()
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        }
        constants |= buffer_values(model, inputs.decoder(model))
    _require_values(config, gm, constants)
    if any(getattr(n.meta.get("val"), "dtype", None) in _COMPLEX for n in gm.graph.nodes):
        raise PopcompileError(f"{config.model_type}: computes with complex numbers, which ONNX has no operators for")
    return Program(graphs={"model": gm}, num_layers=layers, max_positions=context_length(text), constants=constants)


def _arguments(
    inputs: TokenInputs, dtype: torch.dtype, layers: int, heads: int, head_size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of _Decoder, of some size."""
    batch, new, past = 2, 5, 7
    return (
        inputs.examples(batch, new, past + new, dtype),
        [torch.zeros(batch, heads, past, head_size, dtype=dtype) for _ in range(2 * layers)],
    )


@contextlib.contextmanager
def _restoring(model: torch.nn.Module) -> Iterator[None]:
    """Let modules forget what they keep of a run: frequencies of RoPE for its length, for instance."""
    restorers = [remember(module) for module in model.modules()]
    yield
    for restore in restorers:
        restore()


def _cache_shape(config: PretrainedConfig, entries: Sequence[torch.Tensor | None]) -> tuple[int, int]:
    """Key/value heads and head size of the layers' cache entries [B, heads, T, head size], which are alike.

    Raises PopcompileError where they are not.
    """
    shapes = [None if entry is None else (int(entry.shape[1]), int(entry.shape[3])) for entry in entries]
    first = shapes[0]
    for layer, (key, value) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        if key is None or value is None:
            problem = f"layer {layer} keeps no keys and values of its own"
        elif key != value:
            problem = f"keys of {key[1]} features and values of {value[1]}, as in multi-head latent attention (MLA)"
        elif key != first and first:
            problem = f"layer {layer} caches {key[0]} heads of {key[1]} features, layer 0 {first[0]} of {first[1]}"
        else:
            continue
        raise PopcompileError(
            f"{config.model_type}: {problem}; popcompile supports keys and values of one shape in all layers"
        )
    assert first is not None
    return first


def _flat(gm: fx.GraphModule, inputs: Sequence[str], layers: int) -> fx.GraphModule:
    """The exported module over the model's own parameter names, with flat outputs, and inputs of these names."""
    graph = gm.graph
    graph.set_codegen(fx.graph.CodeGen())
    names = [*inputs]
    names += [f"past_key_values_{i}_{kind}" for i in range(layers) for kind in ("key", "value")]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.target = name
        rename(node, name)
    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.target = node.target.removeprefix("decoder.")
    root = gm.get_submodule("decoder")
    first_name: dict[int, str] = {}  # tied parameters appear under their first name
    spelled = dict(root.named_parameters(remove_duplicate=False))
    for name, parameter in spelled.items():
        first_name.setdefault(id(parameter), name)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in spelled:
            node.target = first_name[id(spelled[node.target])]
    flat = LazyGraphModule(root, graph)
    flat.graph.eliminate_dead_code()
    flat.recompile()
    return flat


def buffer_values(model: PreTrainedModel, part: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Real values of buffers of a part of the model that no checkpoint holds: transformers recomputes them.

    This is what from_pretrained does, which builds every model on the meta device.
    """
    values: dict[str, torch.Tensor] = {}
    inside = set(part.modules())
    owners: dict[str, PreTrainedModel] = {}  # a model inside the model initializes what is inside it
    for path, module in model.named_modules():
        parent = owners[path.rpartition(".")[0]] if path else model
        owners[path] = module if isinstance(module, PreTrainedModel) else parent
        computed = computed_buffers(module)
        if not computed or module not in inside:
            continue
        fakes = {n: getattr(module, n) for n in computed}
        for n in computed:
            set_buffer(module, n, _unknown(fakes[n]))
        with torch.no_grad():
            initialize_buffers(owners[path], module)
        for n in computed:
            real = getattr(module, n)
            assert real is not None
            values[f"{path}.{n}" if path else n] = real
            set_buffer(module, n, fakes[n])
    return values


def _unknown(like: torch.Tensor) -> torch.Tensor:
    """A real tensor of the same shape and dtype, with NaN where the dtype has it."""
    return torch.full(like.shape, float("nan") if like.is_floating_point() else 0, dtype=like.dtype)


def _require_values(config: PretrainedConfig, gm: fx.GraphModule, constants: Mapping[str, torch.Tensor]) -> None:
    """Raise PopcompileError for a tensor that the graph reads whose values neither checkpoint nor config give."""
    stored = {name for name, _ in gm.named_parameters()} | set(gm.state_dict())
    for name in {str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and n.users}:
        value = constants.get(name)
        unknown = name not in stored if value is None else bool(value.isnan().any())
        if unknown:
            raise PopcompileError(
                f"{config.model_type}: computes with {name}, which no checkpoint holds and transformers does not"
                " compute from the config again; popcompile does not support such models"
            )


@contextlib.contextmanager
def reporting(config: PretrainedConfig, problem: str) -> Iterator[None]:
    """Turn whatever is raised into a PopcompileError of one line, and keep what is printed beside it to ourselves.

    transformers, torch.export and a model's own code raise anything, and torch.export prints the graph.
    """
    disabled = logging.root.manager.disable
    silence = io.StringIO()
    try:
        logging.disable(logging.CRITICAL)
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            yield
    except PopcompileError as error:
        if config.model_type in str(error):
            raise
        raise PopcompileError(f"{config.model_type}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (_IMPLEMENTATION,):
            problem, error = (
                NOT_TRACED,
                TypeError("its attention does not go through AttentionInterface"),
            )
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            problem, error = NOT_TRACED, TypeError("its module reads the values of tensors")
        raise PopcompileError(f"{config.model_type}: {problem}: {one_line(error)}") from error
    finally:
        logging.disable(disabled)
