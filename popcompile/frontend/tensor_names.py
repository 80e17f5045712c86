"""Which of a checkpoint's tensors a parameter of transformers' module is made of, as transformers itself would load it.

Names are changed by the rules that transformers has for the model type, the base model's prefix is added or taken away,
and a converter's sources are merged, or split. Every tensor of the checkpoint has to go somewhere: one that is left
over says that config and weights belong to different models, unless transformers ignores it too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from popcompile.errors import PopcompileError
from popcompile.frontend.source import Source
from popcompile.frontend.token_inputs import decoder_config, token_inputs
from popcompile.loading import one_line
from popcompile.quiet import errors_only
from popcompile.upstream import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    ignored_tensors,
    rename_source_key,
    tied_parameters,
)

#: what torch.compile's wrapper puts into the names of a module that it is saved through
_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class Converted:
    """A parameter that a converter makes of one or several tensors of the checkpoint.

    target: the first of the parameters that the converter makes, whole names. sources: the tensors, by the pattern of
    `rule` that they match.
    """

    target: str
    rule: WeightConverter
    model: PreTrainedModel = field(repr=False)
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def tensors(self) -> list[str]:
        return list(chain(*self.sources.values()))

    @property
    def parameters(self) -> list[str]:
        """All that the converter makes of these tensors."""
        first, *others = self.rule.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]

    def convert(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter `name`, from what `read` gives for a tensor's name. Takes twice its memory."""
        rule = deepcopy(self.rule)  # it collects tensors
        for pattern, names in self.sources.items():
            for source in names:
                tensor: Future[Tensor] = Future()  # what transformers' loading threads would hand over
                tensor.set_result(read(source))
                rule.add_tensor(self.target, source, pattern, tensor)
        made = rule.convert(self.target, model=self.model, config=self.model.config)
        found = made[name] if name in made or len(made) > 1 else next(iter(made.values()))
        return found[0] if isinstance(found, list) else found

    def absent(self, count: int) -> str | None:
        """A tensor that is missing, under transformers' name, where `count` of them are numbered."""
        prefix, _, suffix = self.target.partition(self.rule.target_patterns[0])
        for pattern in self.rule.source_patterns:
            names = self.sources.get(pattern, [])
            numbers = {int(re.findall(r"\.(\d+)\.", name)[-1]) for name in names} if "*" in pattern else set()
            if missing := [i for i in range(count if "*" in pattern else not names) if i not in numbers]:
                return prefix + pattern.replace("*", str(missing[0])) + suffix
        return None


class TensorNames:
    """The names of a checkpoint's tensors, by the parameters and buffers of transformers' module.

    Attributes:
        found: parameter -> tensor, or what converts tensors to it. Tied parameters are there under the names that the
            checkpoint has.
        unused: tensors that the module has no place for, and that transformers does not ignore.
    """

    def __init__(self, source: Source) -> None:
        """Raises PopcompileError where two tensors are one parameter."""
        self._source = source
        self.module = empty_module(source.config)
        self.found: dict[str, str | Converted] = {}
        self.unused: list[str] = []
        self._resolve(source.tensors())

    def of(self, name: str) -> str | Converted:
        """What a parameter, or one that is tied to it, is made of.

        Raises PopcompileError where the checkpoint lacks it, saying under which prefix it stands if it does.
        """
        for spelled in (name, *self._tied(name)):
            if spelled in self.found:
                return self.found[spelled]
        raise self._not_there(name)

    def require_all_used(self) -> None:
        """Raise PopcompileError for tensors that the module of the config has no place for."""
        if self.unused:
            shown = ", ".join(self.unused[:2])
            more = f" and {len(self.unused) - 2} more" if len(self.unused) > 2 else ""
            raise PopcompileError(
                f"{self._source.name}: the checkpoint has tensors that a {self._source.config.model_type} of its config"
                f" does not have: {shown}{more}; config and weights belong to different models"
            )

    def tied_apart(self) -> bool:
        """Whether the checkpoint holds two different tensors for parameters that its config ties. Reads both."""
        for one, other in tied_parameters(self.module).items():
            names = [self.found.get(one), self.found.get(other)]
            if all(isinstance(name, str) for name in names):
                first, second = (self._source.read(str(name)) for name in names)
                if first.shape != second.shape or not torch.equal(first, second):
                    return True
        return False

    def _resolve(self, stored: Iterable[str]) -> None:
        state = self.module.state_dict()
        mapping = [*get_model_conversion_mapping(self.module), *_converters_of_the_whole(self._source)]
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self.module.base_model_prefix
        ignored = _ignored(self.module)
        for tensor in sorted(stored, key=dot_natural_key):
            plain = tensor.replace(_COMPILED, "")
            name, pattern = rename_source_key(plain, renamings, converters, prefix, state)
            if name not in state and plain in state:  # in transformers' own names already
                name, pattern = rename_source_key(plain, [], [], prefix, state)
            if name not in state:
                if not any(re.search(regex, n) for regex in ignored for n in (name, plain)):
                    self.unused.append(tensor)
                continue
            if pattern is None:
                self._add(name, tensor, tensor)
                continue
            made = self.found.get(name)
            if not isinstance(made, Converted):
                made = Converted(name, by_pattern[pattern], self.module)
                for parameter in made.parameters:
                    self._add(parameter, made, tensor)
            made.sources[pattern].append(tensor)

    def _add(self, name: str, made_of: str | Converted, tensor: str) -> None:
        if name in self.found:
            other = self.found[name]
            raise PopcompileError(
                f"{self._source.name}: {other if isinstance(other, str) else other.tensors[0]} and {tensor} are both"
                f" {name}; save the checkpoint again"
            )
        self.found[name] = made_of

    def _tied(self, name: str) -> list[str]:
        """Other names of the same parameter."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        mine = parameters.get(name)
        return [other for other, parameter in parameters.items() if parameter is mine and other != name]

    def _not_there(self, name: str) -> PopcompileError:
        model = self._source.name
        base = self.module.base_model_prefix + "."
        for ending in dict.fromkeys((name, name.removeprefix(base))):
            for tensor in self.unused:
                if tensor.endswith("." + ending):
                    return PopcompileError(
                        f"{model}: the checkpoint's tensors stand under {tensor.removesuffix(ending)}, as a part of"
                        " another model: add --text-only"
                    )
        return self.missing(name)

    def missing(self, name: str) -> PopcompileError:
        return PopcompileError(
            f"{self._source.name}: the checkpoint has no tensor {name}; its config describes another model,"
            " or files are missing"
        )


def settle_ties(source: Source) -> None:
    """Let the config say whether embedding and head are one tensor, where the checkpoint holds two that differ.

    transformers then keeps both, whatever the config says. Reads both tensors, if there are two.
    """
    if source.kind == "random" or not getattr(source.config, "tie_word_embeddings", False):
        return
    if TensorNames(source).tied_apart():
        source.config.tie_word_embeddings = False


def empty_module(config: PretrainedConfig) -> PreTrainedModel:
    """transformers' module without storage."""
    own_code = type(config).__module__.startswith("transformers_modules")  # it ran already, to read the config
    try:
        with torch.device("meta"), errors_only("transformers"):
            return token_inputs(config).module(deepcopy(config), trust_remote_code=own_code)
    except Exception as error:
        raise PopcompileError(
            f"{config.model_type}: transformers cannot build the model from its config: {one_line(error)}"
        ) from error


def _converters_of_the_whole(source: Source) -> list[WeightConverter]:
    """What the multimodal model that a text decoder is a part of merges, splits or turns of the checkpoint's tensors.

    Its renamings are of prefixes, which the source has taken away.
    """
    rules = (get_checkpoint_conversion_mapping(source.whole.model_type) or ()) if source.whole else ()
    return [rule for rule in rules if isinstance(rule, WeightConverter)]


def _ignored(module: PreTrainedModel) -> list[str]:
    """Patterns of tensors that older or larger models of the kind have, and that transformers ignores."""
    buffers = [name for name, _ in module.named_buffers()]
    patterns = ignored_tensors(module)
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    config = decoder_config(module.config)
    first = getattr(config, "num_hidden_layers", 0)
    predicted = getattr(config, "num_nextn_predict_layers", None) or 0
    # layers that predict further tokens
    return patterns + [rf"layers\.{first + i}\." for i in range(predicted)]
