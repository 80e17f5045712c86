"""Merge a PEFT adapter (LoRA and what else PEFT can merge) into a checkpoint, a tensor at a time.

PEFT itself merges: each adapted linear or embedding layer is put alone into a module tree under its own name, so that
patterns of names mean what they do in the whole model, and is merged there. Conversion so needs no more memory than
without an adapter.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.frontend.hub import snapshot
from popcompile.loading import one_line, quiet, read_json, reading, require_regular

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_IGNORED = {
    "auto_mapping": None, "base_model_name_or_path": None, "revision": None, "inference_mode": True,
    "task_type": None, "modules_to_save": None, "megatron_config": None, "runtime_config": None,
}  # fmt: skip
"""Fields that name another model or code, which is never loaded; the tensors of modules_to_save are there under plain
names.
"""
_RANKS = re.compile(r"(^r|_r|rank|rank_pattern|block_size|num_vectors|vector_length|n_frequency)$")
"""Fields by which PEFT sizes tensors, before it finds that the stored ones are smaller."""
_MOST_BYTES = 2**36
_BY_HAND = "merge it with PEFT (merge_and_unload, save_pretrained) and convert the result"


class Adapter:
    """What PEFT's `save_pretrained` wrote: its config, and tensors by the layers that they belong to.

    name: as the user wrote it, a folder or a hub id.
    """

    def __init__(self, name: str) -> None:
        """Raises PopcompileError for what is no adapter, or none that can be merged into weights."""
        self.name = name
        if importlib.util.find_spec("peft") is None:
            raise PopcompileError(f"--adapter {name}: needs PEFT; pip install peft")
        shown = f"--adapter {name}"
        try:
            with quiet():
                folder = snapshot(name, [_CONFIG, _WEIGHTS])
            for file in (_CONFIG, _WEIGHTS):
                require_regular(shown, folder / file)
            if not (folder / _CONFIG).is_file():
                raise PopcompileError(f"{shown}: no {_CONFIG}; give a folder that PEFT's save_pretrained wrote")
            content = read_json(shown, folder / _CONFIG)
            if not (folder / _WEIGHTS).is_file():
                pickled = ", only pickled weights, which popcompile never loads" if any(folder.glob("*.bin")) else ""
                raise PopcompileError(f"{shown}: no {_WEIGHTS}{pickled}; save the adapter as safetensors")
            if (folder / _WEIGHTS).stat().st_size > _MOST_BYTES:
                raise PopcompileError(f"{shown}: {_WEIGHTS} has more than {_MOST_BYTES:,} bytes; download it again")
            self._tensors = {k.removeprefix(_PREFIX): t for k, t in load_file(folder / _WEIGHTS).items()}
            with (folder / _WEIGHTS).open("rb") as stream:
                self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except (SafetensorError, KeyError) as error:
            raise PopcompileError(f"{shown}: {_WEIGHTS} is corrupt ({one_line(error)}); download it again") from error
        except OSError as error:
            raise PopcompileError(f"{shown}: cannot be read: {one_line(error)}") from error
        if not self._tensors:
            raise PopcompileError(f"{shown}: {_WEIGHTS} has no tensors; download it again")
        largest = max(max(tensor.shape, default=1) for tensor in self._tensors.values())
        self._config = _peft_config(shown, content, largest)

    def fit(self, model: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the layers that the adapter changes in a model with these parameters, by transformers' names.

        Raises PopcompileError where it was made for another model, or changes what cannot be merged.
        """
        self._shapes, self._parts = shapes, defaultdict[str, dict[str, Tensor]](dict)
        layers = {name.removesuffix(".weight"): name for name in shapes if name.endswith(".weight")}
        for key, tensor in self._tensors.items():
            parents = (key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1))
            layer = next((parent for parent in parents if parent in layers), None)
            name = key if key in shapes else layers.get(layer or "")
            if name is None or key.endswith(".base_layer.bias"):
                raise PopcompileError(
                    f"--adapter {self.name}: changes {key}, which {model} does not have or which shares its weight with"
                    f" another layer; give the adapter's own model, or {_BY_HAND}"
                )
            if key == name and tuple(tensor.shape) != shapes[name]:
                raise self._other_shape(model, key, list(tensor.shape), list(shapes[name]))
            self._parts[name][key] = tensor
        for name, parts in self._parts.items():
            if name not in parts:
                self._merged(model, name, torch.empty(shapes[name], device="meta"))

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The parameter `name`, weight or bias, with the adapter's change, in fp32 where there is one."""
        if (whole := self._parts.get(name, {}).get(name)) is not None:
            return whole
        path, _, kind = name.rpartition(".")
        layer, bias = f"{path}.weight", f"{path}.bias"
        if layer not in self._parts:
            return weight
        both = {n: torch.zeros(self._shapes[n]) for n in (layer, bias) if n in self._shapes} | {name: weight.float()}
        return getattr(self._merged(self.name, layer, both[layer], both.get(bias)), kind).detach()

    def _merged(self, model: str, name: str, weight: Tensor, bias: Tensor | None = None) -> Any:
        """The layer of a weight as PEFT itself merges it; on the meta device only a check that it fits."""
        from peft import get_peft_model, set_peft_model_state_dict

        path, config = name.removesuffix(".weight"), copy(self._config)
        if weight.is_meta and hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # other ways decompose the weight
        parts = self._parts[name]
        # PEFT's signature says PreTrainedModel; it takes any module
        tree: Any = _alone(path, weight, bias, self._kind(parts))
        with quiet(), warnings.catch_warnings(action="ignore"):  # of patterns that name other layers
            try:
                adapted = get_peft_model(tree, config)
                left: Any = set_peft_model_state_dict(adapted, {_PREFIX + key: tensor for key, tensor in parts.items()})
            except (RuntimeError, ValueError) as error:
                raise self._other_shape(model, path, *_sizes(parts), list(weight.shape)) from error
            except Exception as error:  # a malformed field raises anything in PEFT
                raise PopcompileError(
                    f"--adapter {self.name}: PEFT cannot apply it to {path}: {one_line(error)}; fix {_CONFIG}"
                ) from error
            if left.unexpected_keys:
                raise PopcompileError(
                    f"--adapter {self.name}: {left.unexpected_keys[0]} is unknown to PEFT; {_BY_HAND}"
                )
            if weight.is_meta:
                return tree
            try:
                return adapted.merge_and_unload().get_submodule(path)
            except Exception as error:  # NotImplementedError of some methods, and what else their fields do
                raise PopcompileError(
                    f"--adapter {self.name}: PEFT cannot merge it into {path}: {one_line(error)}; leave it out"
                ) from error

    def _kind(self, parts: Mapping[str, Tensor]) -> type[nn.Module]:
        """Of the layer that these tensors adapt. PEFT notes that a model has GPT-2's Conv1D, a transposed Linear."""
        if any("embedding" in key.rsplit(".", 1)[1] for key in parts):
            return nn.Embedding
        return Conv1D if getattr(self._config, "fan_in_fan_out", False) else nn.Linear

    def _other_shape(self, model: str, name: str, *shapes: Any) -> PopcompileError:
        *mine, theirs = shapes
        return PopcompileError(
            f"--adapter {self.name}: {name} is made of {' and '.join(map(str, mine))}, which does not fit {model}'s"
            f" {theirs}; give the adapter's own model"
        )


def _peft_config(shown: str, content: dict[str, Any], largest: int) -> Any:
    """The PEFT config of an adapter_config.json; largest: dimension of its tensors. Raises PopcompileError."""
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = content.get("peft_type")
    if not kind:
        raise PopcompileError(f"{shown}: {_CONFIG} names no peft_type; download it again")
    if not isinstance(kind, str) or kind not in list(PeftType):
        raise PopcompileError(f"{shown}: {_CONFIG} is malformed: PEFT does not know peft_type {kind}")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    hints = config_schema.hints_of(cls) | {"alpha_pattern": dict[str, float], "rank_pattern": dict[str, int]}
    hints |= {name: float for name in ("lora_alpha", "alpha") if name in hints}
    given = {name: value for name, value in (content | _IGNORED).items() if value is not None}
    config_schema.check_fields(f"{shown}: {_CONFIG}", given, hints)
    for name, value in given.items():
        sizes = value.values() if isinstance(value, dict) else [value]
        if _RANKS.search(name) and any(isinstance(size, int) and size > largest for size in sizes):
            raise PopcompileError(f"{shown}: {_CONFIG}: {name} is larger than the adapter's tensors; download it again")
    if given.get("layer_replication"):
        raise PopcompileError(f"{shown}: {_CONFIG}: layer_replication makes another model; {_BY_HAND}")
    with quiet(), reading(shown, f"{_CONFIG} is malformed"):
        config: Any = PeftConfig.from_peft_type(**given)
        if config.is_prompt_learning or not hasattr(config, "target_modules"):
            raise PopcompileError(f"{shown}: {config.peft_type} has nothing to merge into weights; leave it out")
    return config


def _sizes(parts: Mapping[str, Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in parts.values()]


def _alone(path: str, weight: Tensor, bias: Tensor | None, kind: type[nn.Module]) -> nn.Module:
    """A module tree with one layer of this kind, at `path`."""
    with torch.device("meta"):
        layer = kind(*(weight.shape if kind is nn.Embedding else reversed(weight.shape)))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    for part in reversed(path.split(".")):
        tree = nn.Module()
        tree.add_module(part, layer)
        layer = tree
    return layer
