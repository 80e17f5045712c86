"""What popcompile takes from other libraries that they do not promise to keep: private names, and names that changed.

No other module imports such a name or reaches into such an attribute (tests/project/test_upstream.py). Each says what
it is for and since which version it holds; where a release changes one, this is the file to edit. Names of transformers
are imported when they are asked for: passes/ and export/ import this module and stand on torch alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import mmap
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch._dispatch.python
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    disable_fake_tensor_cache,
    in_kernel_invocation_manager,
)
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    CACHE: str
    OTHER_CACHE: str

__all__ = [
    "CACHE", "OTHER_CACHE", "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor",
    "FakeTensorMode", "LazyGraphModule", "OpOverload", "WeightConverter", "WeightRenaming", "disable_current_modes",
    "disable_fake_tensor_cache", "dot_natural_key", "get_checkpoint_conversion_mapping", "get_model_conversion_mapping",
    "rename_source_key", "tree_leaves",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Private:
    """A name of another library: where it is, what it is for, and the oldest release that it was seen in."""

    where: str
    purpose: str
    since: str


#: what is imported or read below
NAMES = (
    Private("torch._ops:OpOverload", "tells an ATen operator in a graph from a function", "2.11"),
    Private("torch._ops:OpOverload._schema", "whether an operator changes or shares its input", "2.11"),
    Private("torch._subclasses.fake_tensor:FakeTensorMode", "tracing without weights", "2.11"),
    Private("torch._subclasses.fake_tensor:FakeTensor", "which tensors have no values", "2.11"),
    Private("torch._subclasses.fake_tensor:disable_fake_tensor_cache", "fake values are kept once, not twice", "2.11"),
    Private("torch._subclasses.fake_tensor:FakeTensorMode._cached_dispatch_impl", "results of calls are kept", "2.11"),
    Private("torch._subclasses.fake_tensor:FakeTensorMode._dispatch_impl", "what a call computes", "2.11"),
    Private("torch._subclasses.fake_tensor:in_kernel_invocation_manager", "a result without its mode", "2.11"),
    Private(
        "torch._functorch.config:fake_tensor_allow_unsafe_data_ptr_access", "as torch.export makes its mode", "2.11"
    ),
    Private("torch._guards:TracingContext", "torch.export in a fake mode of ours", "2.11"),
    Private("torch._guards:tracing", "the same", "2.11"),
    Private("torch._subclasses.fake_tensor:DataDependentOutputException", "a module that reads values", "2.11"),
    Private("torch._subclasses.fake_tensor:DynamicOutputShapeException", "a shape that depends on values", "2.11"),
    Private("torch.fx._lazy_graph_module:_LazyGraphModule", "code of a graph when it is first run", "2.11"),
    Private("torch.utils._python_dispatch:_disable_current_modes", "real values while a model is traced", "2.11"),
    Private("torch._dispatch.python:enable_python_dispatcher", "fake values of free sizes, before torch 2.13", "2.11"),
    Private("torch.cpu:_is_avx512_bf16_supported", "whether products of bf16 are faster", "2.11"),
    Private("torch.cpu:_is_amx_tile_supported", "whether PyTorch rounds products of fp32 by itself", "2.11"),
    Private("torch.utils._pytree:tree_leaves", "the nodes among nested arguments", "2.11"),
    Private("torch.fx:Node._rename", "names in printed graphs; Node.name has no setter", "2.11"),
    Private("torch._ops:OpOverload._overloadname", "the overload without its operator", "2.11"),
    Private("torch.nn:Module._buffers", "replace real buffers by fakes and back", "2.11"),
    Private("torch.nn:Module._parameters", "replace real parameters by fakes", "2.11"),
    Private("torch.nn:Module._non_persistent_buffers_set", "which buffers no checkpoint holds", "2.11"),
    Private("transformers.integrations.moe:_default_apply_gate", "which experts are plain SwiGLU", "5.10"),
    Private("transformers:PreTrainedModel._init_weights", "values of buffers that no checkpoint has", "5.10"),
    Private("transformers:GenerationConfig._mask_length", "the columns of a mask that was dropped", "5.12"),
    Private("transformers:PreTrainedModel._tied_weights_keys", "tie a head that is put over a text model", "5.10"),
    Private("transformers:PretrainedConfig._attn_implementation", "attention as it was before tracing", "5.10"),
    Private("transformers:PreTrainedModel._is_hf_initialized", "a flag on parameters that hold values", "5.10"),
    Private("numpy:memmap._mmap", "give the pages of weights back", "2.0"),
    Private("transformers.core_model_loading:WeightConverter", "rules that merge or split tensors", "5.10"),
    Private("transformers.core_model_loading:WeightRenaming", "rules that rename tensors", "5.10"),
    Private("transformers.core_model_loading:rename_source_key", "the parameter that a tensor is loaded to", "5.10"),
    Private("transformers.core_model_loading:dot_natural_key", "the order in which tensors are loaded", "5.10"),
    Private("transformers.conversion_mapping:get_model_conversion_mapping", "those rules for a module", "5.10"),
    Private("transformers.conversion_mapping:get_checkpoint_conversion_mapping", "those for a model type", "5.10"),
    Private("transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected", "tensors that are left out", "5.10"),
    Private(
        "transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLTextModel._deepstack_process",
        "how a decoder adds image features between layers",
        "5.24",
    ),
    Private("transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts._apply_gate", "gpt-oss' SwiGLU", "5.10"),
    Private(
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "what pipelines compare names of classes with",
        "5.10",
    ),
)  # fmt: skip

#: private methods of GenerationMixin that PopForCausalLM overrides, with the parameters that it counts on
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_prepare_generation_config": ("self", "generation_config", "kwargs"),
    "_validate_model_kwargs": ("self", "model_kwargs"),
    "_validate_generation_mode": ("self", "generation_mode", "generation_config", "generation_mode_kwargs"),
    "_validate_generated_length": ("self", "generation_config", "input_ids_length", "has_default_max_length"),
    "_prepare_cache_for_generation": (
        "self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length",
    ),
    "_sample": (
        "self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
        "model_kwargs",
    ),
}  # fmt: skip

#: a setting of torch.fx.config, since torch 2.12
_NO_LINES = "do_not_emit_stack_traces"
#: of operators whose results have shapes that values decide
_UNKNOWN_SHAPES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

_LAZY = {
    "get_checkpoint_conversion_mapping": "transformers.conversion_mapping",
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "WeightConverter": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "rename_source_key": "transformers.core_model_loading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("CACHE", "OTHER_CACHE"):
        # The cache's name in what transformers' models and generation take and return: "cache" since 5.24,
        # "past_key_values" before, whose use 5.24 reports as deprecated. OTHER_CACHE is the other one.
        from transformers.modeling_outputs import CausalLMOutputWithPast

        renamed = "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)}
        return "cache" if renamed is (name == "CACHE") else "past_key_values"
    raise AttributeError(name)


# --- transformers ----------------------------------------------------------------------------------------------


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name that a model's forward gives its cache: a repository's own code keeps the old one."""
    current, other = __getattr__("CACHE"), __getattr__("OTHER_CACHE")
    parameters = inspect.signature(forward).parameters
    return str(other if other in parameters and current not in parameters else current)


def register_for_pipelines(name: str) -> None:
    """Let transformers' text-generation pipeline take models of the class called `name` as it takes its own.

    It compares names of classes with the values of this mapping, also in 5.24, and logs all of them as an error where
    there is none; what AutoModelForCausalLM.register adds is not looked at. The key is nobody's model type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("popcompile", name)


def processor_without_videos(model_type: str, image_processor: Any, tokenizer: Any) -> ProcessorMixin:
    """A model type's processor of text and images, where there is no torchvision for its processor of videos.

    transformers checks the class of each part that a processor is made of, and takes no absence of one.
    """
    cls = _processor_class(model_type)
    unchecked = type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda self, name, part: None})
    processor: ProcessorMixin = unchecked(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )
    return processor


def takes_videos(model_type: str) -> bool:
    """Whether a model type's processor has one of videos in it."""
    return "video_processor" in inspect.signature(_processor_class(model_type).__init__).parameters


def _processor_class(model_type: str) -> Any:
    import transformers

    names = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING_NAMES
    return getattr(transformers, names[model_type])


def ignored_tensors(module: PreTrainedModel) -> list[str]:
    """Patterns of tensors that transformers ignores in a checkpoint of the module; since transformers 5.10."""
    return list(module._keys_to_ignore_on_load_unexpected or ())


def tied_parameters(module: PreTrainedModel) -> dict[str, str]:
    """Parameters that the module's config ties, by name; since transformers 5.10."""
    return dict(module.all_tied_weights_keys)


def tie(module: PreTrainedModel, names: dict[str, str]) -> None:
    """Say which parameters of a module are one where its config ties them, before its `post_init`; since 5.10.

    names: each parameter's to that of the one that it is.
    """
    module._tied_weights_keys = names


def has_default_gate(experts: nn.Module) -> bool:
    """Whether a layer's experts combine their two halves as transformers' own default does: act(gate) * up."""
    from transformers.integrations.moe import _default_apply_gate

    return getattr(type(experts), "_apply_gate", None) is _default_apply_gate


def has_gpt_oss_gate(experts: nn.Module) -> bool:
    """Whether they combine them as gpt-oss does: a capped SwiGLU whose second half is shifted by one."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return getattr(type(experts), "_apply_gate", None) is GptOssExperts._apply_gate


def add_features_to_all_tokens(decoder: nn.Module) -> None:
    """Let a decoder add DeepStack's image features to the hidden states of all tokens, both [batch, sequence, hidden].

    It is given them of image tokens alone, one after the other, and picks these by a mask. Raises AttributeError for a
    decoder that adds them in another way.
    """
    own = decoder._deepstack_process  # so that another way is noticed
    assert callable(own)

    def add(hidden_states: Tensor, _: Any, features: Tensor) -> Tensor:
        return hidden_states + features

    decoder._deepstack_process = add  # type: ignore[assignment]  # torch's Module may hold modules and tensors only


def initialize_buffers(model: Any, module: nn.Module) -> None:
    """Let transformers compute a module's buffers from the config, and leave its parameters as they are.

    `_is_hf_initialized` is its own flag on a parameter that needs no initial values.
    """
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model._init_weights(module)


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model, or a part of one, attend by the function that AttentionInterface knows as `name`, then as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def mask_length(generation_config: Any) -> int | None:
    """Columns of the attention mask that generation dropped, for it hides nothing; None where it dropped none."""
    return getattr(generation_config, "_mask_length", None)


# --- numpy -----------------------------------------------------------------------------------------------------


def memory_map(array: np.memmap) -> mmap.mmap | None:
    """The mapping behind an array, to give its pages back."""
    return getattr(array, "_mmap", None)


# --- torch -----------------------------------------------------------------------------------------------------


@functools.cache
def rounds_in_avx512() -> bool:
    """Whether the CPU multiplies bf16 faster than fp32, and PyTorch does not round fp32 to that by a setting."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def computed_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that no checkpoint holds."""
    return [n for n in module._non_persistent_buffers_set if getattr(module, n) is not None]


def set_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a tensor, fake or real, in a buffer's place."""
    module._buffers[name] = value


def remember(module: nn.Module) -> Callable[[], None]:
    """A function that gives the module back the attributes and buffers that it has now."""
    attributes, buffers = dict(vars(module)), dict(module._buffers)

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)

    return restore


def own_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters and buffers, those that are None too."""
    return {**module._parameters, **module._buffers}


def rename(node: fx.Node, name: str) -> None:
    """Give a node another name, made unique in its graph."""
    node._rename(name)


def operator_name(operator: OpOverload) -> str:
    """Without its namespace and overload: "add" of aten::add.Tensor."""
    return operator._schema.name.split("::")[1]


def overload_name(operator: OpOverload) -> str:
    """ "Tensor" of aten::add.Tensor."""
    return operator._overloadname


def changes_its_input(target: object) -> bool:
    return isinstance(target, OpOverload) and operator_schema(target).is_mutable


def shares_its_input(target: object) -> bool:
    """Whether an operator's result may be a view of an argument."""
    return isinstance(target, OpOverload) and any(r.alias_info is not None for r in operator_schema(target).returns)


def operator_schema(operator: OpOverload) -> Any:
    return operator._schema


def export(
    module: nn.Module, arguments: tuple[Any, ...], shapes: Any, alike: Callable[..., Hashable | None]
) -> torch.export.ExportedProgram:
    """torch.export's program of a module, traced by running it, with what takes most of the time left out.

    shapes: its `dynamic_shapes`. alike: of an operator, its arguments and keyword arguments it makes what is equal for
    calls whose results have equal shapes and types, or None; these are computed once.

    Since torch 2.12 no node says which line of the model's code it comes from, which nobody reads.
    """
    mode = _RepeatingFakeMode(alike)
    before = getattr(fx.config, _NO_LINES, False)
    setattr(fx.config, _NO_LINES, True)
    try:
        with tracing(TracingContext(mode)):  # torch.export takes the context's mode in place of one of its own
            return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
    finally:
        setattr(fx.config, _NO_LINES, before)


class _RepeatingFakeMode(FakeTensorMode):
    """torch.export's own, but for calls that are alike, which are dispatched once. torch keeps results as well, and to
    make a tensor of free sizes of one takes it nearly as long as to compute it.
    """

    def __init__(self, alike: Callable[..., Hashable | None]) -> None:
        sizes = ShapeEnv(tracked_fakes=[], trace_asserts=True)
        with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
            super().__init__(allow_non_fake_inputs=True, shape_env=sizes, export=True)
        self._alike = alike
        self._results: dict[Hashable, tuple[Tensor, torch.device]] = {}

    def _cached_dispatch_impl(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        call = self._alike(func, args, kwargs)
        if call is None:
            return self._dispatch_impl(func, types, args, kwargs)
        if call in self._results:
            return FakeTensor(self, *self._results[call])
        result: Any = self._dispatch_impl(func, types, args, kwargs)
        if _is_new(result, func, args):
            with in_kernel_invocation_manager(self):
                self._results[call] = result.detach(), result.fake_device
        return result


def _is_new(result: object, operator: object, args: Any) -> bool:
    """Whether each call has one fake tensor of its own as its result, of a shape that its arguments' shapes decide."""
    return (
        isinstance(result, FakeTensor)
        and isinstance(operator, OpOverload)
        and result.constant is None
        and not operator_schema(operator).is_mutable
        and not _UNKNOWN_SHAPES.intersection(operator.tags)
        and all(result is not argument for argument in tree_leaves(args))
    )


def symbolic_dispatch() -> contextlib.AbstractContextManager[None]:
    """Around operators on fake tensors of free sizes, outside of tracing.

    Before torch 2.13 some composite operators ask C++ for a size as a number, which fixes a free one to its example.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13):
        return contextlib.nullcontext()
    return torch._dispatch.python.enable_python_dispatcher()
