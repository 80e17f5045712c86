"""A GGUF file as a source: llama.cpp's names and quantized blocks, read by transformers' own loader.

The header is walked here first, because gguf.GGUFReader spends 2 to 11 s on a vocabulary that we do not need in
order to see that a file is cut short, and reports it as a numpy reshape error. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from popcompile.decoders import require_decoder
from popcompile.errors import PopcompileError
from popcompile.loading import quiet, reading
from popcompile.source import Source, TensorInfo, no_tensor, plain, write_tokenizer

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file says.

    Attributes:
        size: metadata and tensor table, in bytes.
        end: offset just past the last tensor, in bytes.
        parts: the number of files that the model was split into.
        has_tokenizer: whether the metadata hold a vocabulary.
    """

    size: int
    end: int
    parts: int
    has_tokenizer: bool


class GgufSource(Source):
    """A .gguf file. Tensors are dequantized to float32 and carry transformers' parameter names.

    Raises:
        PopcompileError: not a GGUF file, cut short, one of several parts, or an architecture that transformers does
            not read; the packages gguf and accelerate are not installed.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise PopcompileError(f"{name}: {path.name} is not a GGUF file; give a .gguf file or a model's folder")
        if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
            raise PopcompileError(f'{name}: GGUF needs {" and ".join(missing)}; pip install "popcompile[gguf]"')
        self._header = check_gguf(name, path)
        with reading(name, f"transformers {transformers.__version__} cannot read this GGUF file"):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        require_decoder(name, config)
        config.architectures = [CAUSAL_LMS[config.model_type]]
        plain(config)
        super().__init__(name, "gguf", config, GenerationConfig.from_model_config(config))

    @cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        with quiet(), reading(self.name, "the tensors of this GGUF file cannot be read"):
            model = AutoModelForCausalLM.from_pretrained(
                self._path.parent, gguf_file=self._path.name, dtype=torch.float32, local_files_only=True
            )
        once: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in model.state_dict().items():
            once.setdefault(tensor.data_ptr(), (name, tensor))  # a tied lm_head is not in the file
        return dict(once.values())

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._state:
            raise no_tensor(self.name, name)
        return self._state[name]

    def save_tokenizer(self, folder: Path) -> list[str]:
        if not self._header.has_tokenizer:
            return []
        return write_tokenizer(self.name, self._path.parent, folder, gguf_file=self._path.name)

    def fingerprint(self) -> dict[str, str]:
        with self._path.open("rb") as stream:
            header = hashlib.sha256(stream.read(self._header.size)).hexdigest()
        return {"gguf_header_sha256": header, "gguf_bytes": str(self._path.stat().st_size)}


def check_gguf(model: str, path: Path) -> GgufHeader:
    """Walk the header of a GGUF file and check that every tensor lies within the file.

    Raises:
        PopcompileError: truncated, a version other than 2 and 3, or one part of several.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _walk(data)
        except (struct.error, LookupError, ValueError, TypeError, ArithmeticError) as error:
            raise PopcompileError(f"{model}: the GGUF header is truncated or corrupt; download it again") from error
        if header.parts > 1:
            raise PopcompileError(f"{model}: one of {header.parts} parts; merge them first (llama-gguf-split --merge)")
        if header.end > len(data):
            raise PopcompileError(
                f"{model}: truncated: its header needs {header.end:,} bytes, the file has {len(data):,}; "
                "download it again"
            )
        return header


def _walk(data: mmap.mmap) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return value

    def string() -> bytes:
        nonlocal at
        start = at + 8
        at = start + take("Q")
        return data[start:at]

    def value() -> Any:
        nonlocal at
        kind = take("I")
        if kind != ARRAY:
            return string() if kind == STRING else take(SCALARS[kind])
        element, count = take("I"), take("Q")
        if element == STRING:
            for _ in range(count):
                string()
        else:
            at += count * struct.calcsize(SCALARS[element])
        return None

    version, tensor_count, metadata_count = take("I"), take("Q"), take("Q")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}")
    metadata = {}
    for _ in range(metadata_count):
        key = string()
        metadata[key] = value()
    extents = [0]
    for _ in range(tensor_count):
        string()
        elements = math.prod([take("Q") for _ in range(take("I"))])
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(take("I"))]
        extents.append(take("Q") + elements // block * size)
    alignment = metadata.get(b"general.alignment", 32)
    start = -(-at // alignment) * alignment
    return GgufHeader(at, start + max(extents), metadata.get(b"split.count", 1), b"tokenizer.ggml.tokens" in metadata)
