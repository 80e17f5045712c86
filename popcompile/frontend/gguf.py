"""A GGUF file as a source: llama.cpp's names and quantized blocks, by transformers' names and in float32.

A GGUF file is read alone: config and tensors come from the file itself, and transformers, which builds the tokenizer,
is shown a private folder that holds nothing but a link to it.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    TOKENIZER_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from popcompile.errors import PopcompileError
from popcompile.frontend.decoders import require_decoder
from popcompile.frontend.gguf_architectures import OWN_SPLITS, Architecture
from popcompile.frontend.gguf_config import INSTEAD, architecture_of, gguf_config
from popcompile.frontend.gguf_header import GgufHeader, read_header
from popcompile.frontend.source import Source, TensorInfo, no_tensor, write_tokenizer
from popcompile.loading import one_line, quiet, reading, require_regular


class GgufSource(Source):
    """A .gguf file. Tensors are dequantized to float32, one at a time, and carry transformers' parameter names.

    Raises:
        PopcompileError: not a GGUF file, cut short, one of several parts, an architecture that is not read, metadata
            or tensors that nothing reads, parameters without a tensor; the package gguf is not installed.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._path = path
        require_regular(name, path)
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise PopcompileError(f"{name}: {path.name} is not a GGUF file; give a .gguf file or a model's folder")
        if importlib.util.find_spec("gguf") is None:
            raise PopcompileError(f'{name}: GGUF needs gguf; pip install "popcompile[gguf]"')
        self._header = read_header(name, path)
        architecture = architecture_of(name, self._header)
        config, used = gguf_config(name, self._header, lambda tensor: self._dequantized(tensor).numpy())
        require_decoder(name, config)
        self._parameters = _parameters(name, self._header, architecture, config, used)
        super().__init__(name, "gguf", config, GenerationConfig.from_model_config(config))

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(parameter.shape, torch.float32) for name, parameter in self._parameters.items()}

    def read(self, name: str) -> Tensor:
        if name not in self._parameters:
            raise no_tensor(self.name, name)
        parameter = self._parameters[name]
        with reading(self.name, f"the tensors of {name} cannot be read"):
            return parameter.make([self._dequantized(tensor) for tensor in parameter.tensors])

    def _dequantized(self, name: str) -> Tensor:
        """One tensor of the file, in float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self._header.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        with self._path.open("rb") as stream:
            stream.seek(tensor.start)
            blocks = np.fromfile(stream, np.uint8, tensor.bytes)
        if blocks.size != tensor.bytes:
            raise PopcompileError(f"{self.name}: {self._path.name} was cut short after it was opened; try again")
        with np.errstate(all="ignore"):  # of scales that are NaN: what they give is refused where it is read
            return torch.from_numpy(dequantize(blocks.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind))

    def save_tokenizer(self, folder: Path) -> list[str]:
        if "tokenizer.ggml.tokens" not in self._header.metadata:
            return []
        files = write_tokenizer(self.name, self._tokenizer, folder)
        split = self._header.metadata.get("tokenizer.ggml.pre")
        if self._header.metadata.get("tokenizer.ggml.model") == "gpt2" and split in OWN_SPLITS:
            written = json.loads((folder / "tokenizer.json").read_bytes())
            if '"Split"' not in json.dumps(written["pre_tokenizer"]):
                raise PopcompileError(
                    f"{self.name}: transformers {transformers.__version__} does not know tokenizer.ggml.pre ="
                    f" {split!r}; update transformers"
                )
        return files

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """As transformers builds it, of the class that AutoTokenizer would choose after it has read the file for a
        config, which takes ten times as long.
        """
        kind: Any = TOKENIZER_MAPPING.get(type(self.config), PreTrainedTokenizerFast)
        if isinstance(kind, tuple):  # of a slow class and a fast one, either of which may be missing
            kind = kind[1] or kind[0]
        with alone(self.name, self._path) as link, quiet(), reading(self.name, "the tokenizer cannot be loaded"):
            return kind.from_pretrained(link.parent, gguf_file=link.name, local_files_only=True)

    def fingerprint(self) -> dict[str, str]:
        with self._path.open("rb") as stream:
            header = hashlib.sha256(stream.read(self._header.size)).hexdigest()
        return {"gguf_header_sha256": header, "gguf_bytes": str(self._path.stat().st_size)}


def inner_name(model: str, gguf_file: str) -> str:
    """`gguf_file`, or a PopcompileError where it is no name inside the folder or hub repository `model`."""
    path = PurePath(gguf_file)
    if path.is_absolute() or path.drive or ".." in path.parts or "\\" in gguf_file or not path.parts:
        raise PopcompileError(f"{model}: --gguf-file {gguf_file}: leaves {model}; name a file inside it")
    return gguf_file


@contextlib.contextmanager
def alone(model: str, path: Path) -> Iterator[Path]:
    """A link to `path` in a private folder, under a name that no other folder has; nothing lies beside it.

    transformers looks for a gguf_file in the working folder first, and for configs, tokenizers and adapters beside it.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="popcompile-")
    except OSError as error:
        raise PopcompileError(
            f"{model}: no temporary folder can be made ({one_line(error)}); set TMPDIR to a writable folder"
        ) from error
    with temporary as folder:
        link = Path(folder) / f"{Path(folder).name}.gguf"
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows without the privilege
            try:
                os.link(path.resolve(), link)
            except OSError as error:
                raise PopcompileError(
                    f"{model}: no link to it can be made in {folder}; set TMPDIR to a folder on the same disk"
                ) from error
        yield link


# --- parameters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    """A parameter of transformers' module. tensors: what the file holds of it. make: the parameter from them."""

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


def _parameters(
    model: str, header: GgufHeader, architecture: Architecture, config: PretrainedConfig, used: set[str]
) -> dict[str, _Parameter]:
    """Every parameter of the module by name, each with its tensors, where all of them fit and all are used.

    used: tensors that went into the config.
    """
    _require_dequantizable(model, header)
    parameters, missing = {}, []
    spelled = _spelling(header.metadata["general.architecture"], config.num_hidden_layers)
    for name, shape in _module_shapes(model, config).items():
        tensors = _stored_as(name, architecture, spelled)
        if absent := [tensor for tensor in tensors if tensor not in header.tensors]:
            missing += absent
            continue
        change = _change(tensors[0], architecture, config)
        make = _joined if len(tensors) > 1 else change
        meta = [torch.empty(header.tensors[tensor].shape, device="meta") for tensor in tensors]
        with reading(model, f"{', '.join(tensors)} do not make {name}"):
            made = tuple(make(meta).shape)
        if made != shape:
            raise PopcompileError(
                f"{model}: {' and '.join(tensors)} make {name} with shape {list(made)}, the metadata ask for"
                f" {list(shape)}; download the file again"
            )
        parameters[name] = _Parameter(shape, tensors, make)
    if missing:
        raise PopcompileError(f"{model}: the file has no {_some(missing)}; download it again, or {INSTEAD}")
    read = used.union(*(parameter.tensors for parameter in parameters.values()))
    if unread := [name for name in header.tensors if name not in read]:
        raise PopcompileError(
            f"{model}: the file has {_some(unread)}, which {architecture.model_type} of transformers has no place for;"
            f" {INSTEAD}"
        )
    return parameters


def _require_dequantizable(model: str, header: GgufHeader) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for number, name in {tensor.kind: name for name, tensor in header.tensors.items()}.items():
        kind = GGMLQuantizationType(number)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise PopcompileError(
                f"{model}: {name} holds {kind.name}, which gguf does not dequantize; {INSTEAD}"
            ) from error


def _module_shapes(model: str, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    with quiet(), reading(model, "transformers cannot build the model from the metadata"), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}  # tied ones once


def _spelling(architecture: str, layers: int) -> Callable[[str], str | None]:
    """llama.cpp's name for a module of transformers."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, layers).get_name


def _stored_as(name: str, architecture: Architecture, spelled: Callable[[str], str | None]) -> tuple[str, ...]:
    """The tensors that a parameter is stored as; its own name where llama.cpp has none."""
    for ending, parts in architecture.merged.items():
        if match := re.fullmatch(rf".*\.layers\.(\d+)\.{re.escape(ending)}", name):
            return tuple(f"blk.{match[1]}.{part}" for part in parts)
    module, _, kind = name.rpartition(".")
    found = spelled(module)
    return (f"{found}.{kind}" if found else name,)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


# --- what llama.cpp's converter changed, undone --------------------------------------------------------------------


def _change(tensor: str, architecture: Architecture, config: PretrainedConfig) -> Callable[[list[Tensor]], Tensor]:
    kind = next((kind for pattern, kind in architecture.changed.items() if re.fullmatch(pattern, tensor)), None)
    changes: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda x: x,
        "subtract_one": lambda x: x - 1,  # norms that multiply by 1 + weight
        "transpose": lambda x: x.T.contiguous(),
        "as_row": lambda x: x[None] if x.dim() == 1 else x,
        "unpermute_q": lambda x: _unpermute(x, config.num_attention_heads),
        "unpermute_k": lambda x: _unpermute(x, config.num_key_value_heads),
    }
    change = changes[kind]
    return lambda parts: change(parts[0])


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * size, ...] from pairs that lie side by side, as llama.cpp rotates them, to two halves."""
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2)
    return halves.reshape(rows.shape)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)
