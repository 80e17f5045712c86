"""Trace a Hugging Face decoder into one flat FX graph, without its weights.

The model is built from its config with fake tensors, so time and memory do not depend on its size. Attention, the
cache update and a layer's experts are registered with transformers' own extension points and stay single nodes;
torch.export keeps batch, sequence and past length free. Parameters keep their names.

    inputs   input_ids [batch, sequence], attention_mask [batch, total],
             past_key_values.N.key / .value [batch, kv_heads, past, head]
    outputs  logits [batch, sequence, vocabulary], present.N.key / .value [batch, kv_heads, total, head]
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface

from popcompile.errors import PopcompileError
from popcompile.loading import errors_only
from popcompile.passes import ops
from popcompile.passes.base import Program
from popcompile.upstream import (
    FakeTensorMode,
    cache_argument,
    computed_buffers,
    has_default_gate,
    initialize_buffers,
    rename,
    set_buffer,
)

#: what transformers knows the functions below as
_IMPLEMENTATION = "popcompile"
#: the one activation of experts that are compiled, by the names that configs give it
_SILU = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))
#: the traced module's positions node, for the functions below that transformers calls without it
_positions: list[torch.Tensor] = []


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
    **unsupported: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, D] and the cache -> [B, S, H, D]."""
    if attention_mask is not None or unsupported.get("s_aux") is not None:
        raise PopcompileError(
            f"{type(module).__name__} passes attention a mask or sinks of its own; popcompile supports causal and"
            " sliding-window attention"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = ops.attention(
        query, key, value, _positions[-1], float(scale), int(sliding_window or 0), float(softcap or 0.0)
    )
    return out.transpose(1, 2), None


AttentionInterface.register(_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_IMPLEMENTATION, lambda *_, **__: None)


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden_states [N, hidden], top_k_index and top_k_weights [N, k]."""
    parameters = {name for name, _ in module.named_parameters()}
    stored_as_known = (
        parameters == {"gate_up_proj", "down_proj"} and module.is_concatenated and not module.is_transposed
    )
    if not stored_as_known or not has_default_gate(module) or not isinstance(module.act_fn, _SILU):
        raise PopcompileError(
            f"{type(module).__name__} has other experts than popcompile supports: SwiGLU blocks (hidden_act silu)"
            " without biases"
        )
    return ops.experts(hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts)


class _TracedLayer(DynamicLayer):
    """One layer's cache: grows by one append_kv node each for key and value."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.past_key, self.past_value = key, value
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions = _positions[-1]
        self.keys = ops.append_kv(self.past_key, key_states, positions)
        self.values = ops.append_kv(self.past_value, value_states, positions)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.past_key.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past_key.shape[2] + query_length, 0


class _Decoder(torch.nn.Module):
    """The model with flat inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
        positions = ops.token_positions(attention_mask, input_ids)
        layers = [_TracedLayer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)]
        _positions.append(positions)
        try:
            cache = Cache(layers=list(layers))
            named = {cache_argument(self.decoder.forward): cache}
            out = self.decoder(input_ids=input_ids, position_ids=positions, use_cache=True, **named)
        finally:
            _positions.pop()
        return out.logits, [t for layer in layers for t in (layer.keys, layer.values)]


def trace(config: PretrainedConfig, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Program:
    """Trace the decoder that `config` describes; parameters are fake tensors of `dtype`.

    Raises PopcompileError where the model cannot be built from its config or traced.
    """
    config = copy.deepcopy(config)  # building a model writes to its config
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=_IMPLEMENTATION,
                experts_implementation=_IMPLEMENTATION,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            ).eval()
        except PopcompileError:
            raise
        except Exception as error:
            raise PopcompileError(
                f"{config.model_type}: transformers cannot build the model from its config: {_first_line(error)}"
            ) from error
    heads, head_size = _cache_shape(config)
    layers = config.num_hidden_layers
    batch, new, past = 2, 5, 7
    with mode:
        arguments = (
            torch.zeros(batch, new, dtype=torch.int64),
            torch.ones(batch, past + new, dtype=torch.int64),
            [torch.zeros(batch, heads, past, head_size, dtype=dtype) for _ in range(2 * layers)],
        )
    dims = {name: torch.export.Dim(name) for name in ("batch", "sequence", "total", "past")}
    shapes = (
        {0: dims["batch"], 1: dims["sequence"]},
        {0: dims["batch"], 1: dims["total"]},
        [{0: dims["batch"], 2: dims["past"]} for _ in range(2 * layers)],
    )
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(_Decoder(model), arguments, dynamic_shapes=shapes, strict=False)
        except PopcompileError:
            raise
        except Exception as error:
            raise PopcompileError(
                f"{config.model_type}: torch.export cannot trace this model: {_first_line(error)};"
                " popcompile supports decoders whose layers are attention and feed-forward blocks"
            ) from error
    gm = _flat(exported.module(check_guards=False), layers)
    return Program(
        graphs={"model": gm},
        num_layers=layers,
        max_positions=config.max_position_embeddings,
        constants=_computed_buffers(model),
    )


def _cache_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Key/value heads and head size of a layer's cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, size


def _flat(gm: fx.GraphModule, layers: int) -> fx.GraphModule:
    """The exported module over the model's own parameter names, with flat inputs and outputs."""
    graph = gm.graph
    graph.set_codegen(fx.graph.CodeGen())
    names = ["input_ids", "attention_mask"]
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
    flat = fx.GraphModule(root, graph)
    flat.graph.eliminate_dead_code()
    flat.recompile()
    return flat


def _computed_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Real values of buffers that no checkpoint holds: transformers recomputes them from the config.

    This is what from_pretrained does, which builds every model on the meta device.
    """
    values: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        computed = computed_buffers(module)
        if not computed:
            continue
        fakes = {n: getattr(module, n) for n in computed}
        for n in computed:
            set_buffer(module, n, torch.full(fakes[n].shape, float("nan"), dtype=fakes[n].dtype))
        with torch.no_grad():
            initialize_buffers(model, module)
        for n in computed:
            real = getattr(module, n)
            assert real is not None
            values[f"{path}.{n}" if path else n] = real
            set_buffer(module, n, fakes[n])
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.export's and transformers' warnings, which name nothing that a user could change."""
    with warnings.catch_warnings(action="ignore"), errors_only("transformers", "torch.export", "torch.onnx"):
        yield
