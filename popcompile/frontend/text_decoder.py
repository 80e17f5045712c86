"""The tensors of a multimodal checkpoint that are its text decoder's, by the names that they have in one of its own.

Under which prefix they stand differs by model, and by the transformers that saved them:

    language_model.model.layers.0...   language_model.lm_head.weight
    model.language_model.layers.0...   lm_head.weight

No table says which it is: it is the prefix under which most of the decoder's own parameters are found. What else the
checkpoint holds, an image encoder for instance, is never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.frontend.source import Source, TensorInfo, no_tensor
from popcompile.frontend.tensor_names import empty_module


class TextDecoderSource(Source):
    """The tensors of another source that are its text decoder's, by transformers' names of the decoder alone."""

    def __init__(self, base: Source, stored: dict[str, str]) -> None:
        """stored: the decoder's tensors by their names here -> their names in `base`."""
        super().__init__(base.name, base.kind, base.config, base.generation_config, base.whole)
        self._base, self._stored = base, stored

    def tensors(self) -> Mapping[str, TensorInfo]:
        stored = self._base.tensors()
        return {name: stored[tensor] for name, tensor in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._stored:
            raise no_tensor(self.name, name)
        return self._base.read(self._stored[name])

    def save_tokenizer(self, folder: Path) -> list[str]:
        return self._base.save_tokenizer(folder)

    def fingerprint(self) -> dict[str, str]:
        return self._base.fingerprint()


def text_decoder(source: Source) -> Source:
    """The text decoder that the config of `source` describes; the source itself where its tensors are that already.

    Raises PopcompileError where it has no tensors of such a decoder.
    """
    stored = source.tensors()
    config_schema.check_tensors(source.name, source.config, {name: info.shape for name, info in stored.items()})
    try:
        module = empty_module(source.config)
    except PopcompileError as error:
        raise PopcompileError(f"{source.name}: {error}") from error
    names = decoder_names(stored, module)
    if not names:
        raise PopcompileError(
            f"{source.name}: the checkpoint has no tensors of a {source.config.model_type}; its config describes"
            " another model, or files are missing"
        )
    base = f"{module.base_model_prefix}."
    if source.whole is None and all(there in (name, name.removeprefix(base)) for name, there in names.items()):
        return source
    return TextDecoderSource(source, names)


def decoder_names(stored: Iterable[str], module: PreTrainedModel) -> dict[str, str]:
    """The tensors of a checkpoint that are the decoder's, by the names that they would have in one of its own.

    module: the decoder. Empty where none of its parameters is found under any prefix.
    """
    stored = list(stored)
    base = f"{module.base_model_prefix}."
    parameters = list(module.state_dict())
    inner = {name.removeprefix(base) for name in parameters if name.startswith(base)}
    found = Counter(prefix for name in stored for prefix, rest in _splits(name) if rest in inner)
    if not found:
        return {}
    prefix = found.most_common(1)[0][0]
    parts = {name.partition(".")[0] for name in inner}  # of the decoder: what else is there is not its own
    rest = {name: name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
    names = {base + ending: name for name, ending in rest.items() if ending.partition(".")[0] in parts}
    for head in (name for name in parameters if not name.startswith(base)):
        around = [outer + head for outer, _ in _splits(prefix + head) if prefix.startswith(outer)]
        if there := [name for name in reversed(around) if name in stored]:
            names[head] = there[0]
    return names


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A dotted name in two, everywhere: ("", "a.b"), ("a.", "b")."""
    parts = name.split(".")
    for i in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:i]), ".".join(parts[i:])
