"""Where a model comes from: its text decoder's config, its tensors one at a time, and its tokenizer.

A `Source` does not build the model of a safetensors checkpoint: names and shapes come from the headers and each
tensor is read when it is asked for, so converting needs the memory of one tensor. So it is with a GGUF file, which
holds llama.cpp's names and quantized blocks.

    open_source("org/name")                     the hub, or its local cache; "org/name@revision" too
    open_source("folder")                       config.json + model.safetensors, or shards and their index
    open_source("model.gguf")                   also open_source("folder", gguf_file="model.gguf")
    open_source("folder", text_only=True)       the text decoder of a multimodal checkpoint
    open_source("folder", random_weights=True)  config.json alone is enough
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.files import require_utf8
from popcompile.frontend.folder_configs import (
    TOKENIZER_FILES,
    files_in,
    folder_config,
    generation_config,
    private_copy,
    processor_template,
)
from popcompile.frontend.hub import download, local_path
from popcompile.frontend.processor_files import PROCESSOR_FILES, read_processor
from popcompile.frontend.token_inputs import decoder_config
from popcompile.loading import (
    CONFIG_BYTES,
    TABLE_BYTES,
    one_line,
    quiet,
    read_file,
    read_json,
    reading,
    require_regular,
)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """The shape and stored dtype of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(ABC):
    """A model as the user named it: config, tensors and tokenizer, each read only when asked for.

    Attributes:
        name: what the user wrote, a hub id or a path.
        kind: "hub", "folder", "gguf" or "random".
        config: the model's config, without `quantization_config`.
        generation_config: the checkpoint's own, or the one that transformers derives from the config.
        whole: the config of the multimodal model whose text decoder this is, or None.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        whole: PretrainedConfig | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.config = config
        self.generation_config = generation_config
        self.whole = whole

    @property
    def decoder_config(self) -> PretrainedConfig:
        """The text decoder's config, which a vision-language model's holds inside."""
        return decoder_config(self.config)

    @property
    def has_images(self) -> bool:
        """Whether the model takes images, and is compiled with its vision tower."""
        return self.decoder_config is not self.config

    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint by its name there. Tied weights appear once. Reads no safetensors data.

        Raises:
            PopcompileError: a missing, truncated or corrupt weight file.
        """

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored shape and dtype.

        Raises:
            PopcompileError: the checkpoint has no tensor of that name.
        """

    @abstractmethod
    def save_tokenizer(self, folder: Path) -> list[str]:
        """Write tokenizer files and chat template into `folder`; their names, or [] for a model without tokenizer.

        Raises:
            PopcompileError: the tokenizer cannot be loaded.
        """

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """What the processor of images is configured by: contents of JSON files, by name; {} where there are none.

        Raises:
            PopcompileError: the model takes images, and has no processor, or none that can be loaded.
        """
        return {}

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What identifies the checkpoint for a manifest: hashes of config and headers (not of tensor data), sizes."""


class FolderSource(Source):
    """A folder, the user's or a snapshot in the hub's cache: config.json, safetensors, tokenizer files."""

    def __init__(
        self, name: str, kind: str, folder: Path, trust_remote_code: bool, random_weights: bool, text_only: bool = False
    ) -> None:
        """text_only: where the config is of a multimodal model, take the one of its text decoder."""
        require_utf8(folder)
        self._folder = folder
        self._trust_remote_code = trust_remote_code
        config, whole, raw = folder_config(name, folder, trust_remote_code, text_only)
        quantization = _quantization(raw) or (_quantization(raw.get("text_config") or {}) if whole else None)
        if quantization and not random_weights:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise PopcompileError(f"{name}: quantized checkpoint (quant_method {method}); give the unquantized one")
        plain(config)
        super().__init__(name, kind, config, generation_config(name, folder, config), whole)

    @cached_property
    def _shards(self) -> dict[str, Any]:
        """Tensor name to the opened (memory-mapped) shard that holds it."""
        single, index = self._folder / "model.safetensors", self._folder / "model.safetensors.index.json"
        for file in (single, index):
            require_regular(self.name, file)
        if single.is_file():
            shard = self._open(single)
            return dict.fromkeys(shard.keys(), shard)
        if not index.is_file():
            raise PopcompileError(self._no_weights())
        weight_map = read_json(self.name, index, TABLE_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise PopcompileError(f"{self.name}: {index.name} has no weight_map; download the checkpoint again")
        opened, names = {}, {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not os.path.exists(self._folder / file):
                raise PopcompileError(f"{self.name}: {index.name} names {file}, which is missing; download it again")
            opened[file] = self._open(self._folder / file)
            names[file] = set(opened[file].keys())
        for tensor, file in weight_map.items():
            if tensor not in names[file]:
                raise PopcompileError(
                    f"{self.name}: {file} lacks {tensor}, which {index.name} names; download it again"
                )
        return {tensor: opened[file] for tensor, file in weight_map.items()}

    def _open(self, path: Path) -> Any:
        require_regular(self.name, path)
        with path.open("rb"):  # safetensors reports a file without read permission as missing
            pass
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise PopcompileError(
                f"{self.name}: {path.name} is truncated or corrupt ({one_line(error)}); download it again"
            ) from error

    def _no_weights(self) -> str:
        if files_in(self._folder, "*.bin", "*.pt", "*.pth", "*.ckpt"):
            return (
                f"{self.name}: only pickled weights, which popcompile never loads; convert them to safetensors "
                "(transformers: from_pretrained, then save_pretrained)"
            )
        if ggufs := files_in(self._folder, "*.gguf"):
            return f"{self.name}: no model.safetensors; to read {ggufs[0]} give --gguf-file {ggufs[0]}"
        return f"{self.name}: no model.safetensors and no model.safetensors.index.json; add them"

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, shard in self._shards.items():
            view = shard.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise PopcompileError(
                    f"{self.name}: {name} has dtype {view.get_dtype()}; give an unquantized checkpoint"
                )
            infos[name] = TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])
        return infos

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        if name not in self._shards:
            raise no_tensor(self.name, name)
        tensor: torch.Tensor = self._shards[name].get_tensor(name)
        return tensor

    def save_tokenizer(self, folder: Path) -> list[str]:
        if not files_in(self._folder, "tokenizer*", "vocab*", "*.model", "*.tiktoken"):
            return []
        template = processor_template(self.name, self._folder) if self.whole or self.has_images else None
        if self._trust_remote_code:
            tokenizer = _read_tokenizer(self.name, self._folder, template, trust_remote_code=True)
            return write_tokenizer(self.name, tokenizer, folder, trust_remote_code=True)
        with private_copy(self.name, self._folder) as copy:
            return write_tokenizer(self.name, _read_tokenizer(self.name, copy, template), folder)

    def processor_files(self) -> dict[str, dict[str, Any]]:
        return read_processor(self.name, self._folder) if self.has_images else {}

    def fingerprint(self) -> dict[str, str]:
        config = read_file(self.name, self._folder / "config.json", CONFIG_BYTES)
        marks = {"config_sha256": hashlib.sha256(config).hexdigest()}
        if self.kind == "hub" and self._folder.parent.name == "snapshots":
            marks["revision"] = self._folder.name
        if files := files_in(self._folder, "model*.safetensors"):
            headers = hashlib.sha256()
            for file in files:
                with (self._folder / file).open("rb") as stream:
                    size = stream.read(8)
                    headers.update(file.encode() + size + stream.read(min(int.from_bytes(size, "little"), TABLE_BYTES)))
            marks["safetensors_headers_sha256"] = headers.hexdigest()
            marks["safetensors_bytes"] = str(sum((self._folder / file).stat().st_size for file in files))
        return marks


class RandomSource(Source):
    """Another source's config and tokenizer without its weights: the caller takes them from `random_tensor`."""

    def __init__(self, base: Source) -> None:
        super().__init__(base.name, "random", base.config, base.generation_config, base.whole)
        self._base = base

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}

    def read(self, name: str) -> torch.Tensor:
        raise no_tensor(self.name, name)

    def save_tokenizer(self, folder: Path) -> list[str]:
        return self._base.save_tokenizer(folder)

    def fingerprint(self) -> dict[str, str]:
        marks = self._base.fingerprint()
        return {key: marks[key] for key in ("config_sha256", "revision", "gguf_header_sha256") if key in marks}


def open_source(
    model: str,
    *,
    text_only: bool = False,
    gguf_file: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """Find `model` and read its config and headers; no tensor data is read yet.

    Args:
        model: a folder, a .gguf file, or a hub id such as "org/name" or "org/name@revision".
        text_only: take the text decoder of a multimodal model; a model of text alone is taken as it is.
        gguf_file: the .gguf file to read inside the folder or hub repository.
        random_weights: ask for no weight file; the caller fills tensors with `random_tensor`.
        trust_remote_code: run the Python code that a checkpoint brings along.

    Raises:
        PopcompileError: no such model, an unreadable, malformed, truncated, pickled or quantized checkpoint, or an
            architecture that is not a decoder-only causal LM with attention in every layer.
    """
    with quiet():
        try:
            source = _open(model, text_only, gguf_file, random_weights, trust_remote_code)
        except PermissionError as error:
            raise PopcompileError(
                f"{model}: permission denied reading {error.filename}; make it readable for this user"
            ) from error
        except OSError as error:
            raise PopcompileError(f"{model}: cannot be read: {one_line(error)}") from error
        return RandomSource(source) if random_weights else source


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that depends on its name, shape and dtype alone: normal with standard deviation 0.02, norms ones."""
    if name.endswith("norm.weight") or "layernorm.weight" in name:
        return torch.ones(shape, dtype=dtype)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # torch seeds are signed
    return torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _open(model: str, text_only: bool, gguf_file: str | None, random_weights: bool, trust_remote_code: bool) -> Source:
    from popcompile.frontend.gguf import GgufSource, inner_name  # they build on this module
    from popcompile.frontend.text_decoder import text_decoder

    path = local_path(model)
    local = path is not None
    if path is not None and not path.is_dir():
        require_regular(model, path)
        if gguf_file:
            raise PopcompileError(f"{model}: is a file already; drop --gguf-file {gguf_file}")
        return GgufSource(model, path)
    if gguf_file:
        inner_name(model, gguf_file)
        file = local_path(str(path / gguf_file)) if path is not None else download(model, file=gguf_file)
        if file is None or file.is_dir():
            found = ", ".join(files_in(path, "*.gguf") if path is not None else []) or "none"
            raise PopcompileError(f"{model}: has no file {gguf_file}; its .gguf files: {found}")
        require_regular(model, file)
        return GgufSource(model, file)
    if path is None:
        wanted = ["config.json", "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES]
        wanted += [] if random_weights else ["model*.safetensors", "model.safetensors.index.json"]
        path = download(model, wanted=[*wanted, "*.py"] if trust_remote_code else wanted)
    kind = "folder" if local else "hub"
    source: Source = FolderSource(model, kind, path, trust_remote_code, random_weights, text_only)
    if text_only and not random_weights:
        source = text_decoder(source)
    if not random_weights:  # headers only: a broken checkpoint is reported before any work
        shapes = {name: info.shape for name, info in source.tensors().items()}
        config_schema.check_tensors(model, source.decoder_config, shapes)
    return source


def _read_tokenizer(
    model: str, folder: Path, template: str | None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. template: the chat template of one that has none of its own."""
    with quiet(), reading(model, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        tokenizer.chat_template = tokenizer.chat_template or template
        return tokenizer


def write_tokenizer(
    model: str, tokenizer: PreTrainedTokenizerBase, folder: Path, *, trust_remote_code: bool = False
) -> list[str]:
    """Write the tokenizer into `folder`; the names of its files. trust_remote_code: it may be code of the model's."""
    with quiet(), reading(model, "the tokenizer cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        written = tokenizer.save_pretrained(folder)
        _for_other_readers(folder / "tokenizer_config.json", tokenizer, trust_remote_code)
    return sorted({Path(path).relative_to(folder).as_posix() for path in written if Path(path).is_file()})


def _for_other_readers(path: Path, tokenizer: Any, trust_remote_code: bool) -> None:
    """Name the class as transformers 4 does, and the inputs, which it would not find: optimum needs it.

    Without the code that was not run: readers would ask for it.
    """
    config = json.loads(path.read_bytes())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    if not trust_remote_code:
        config.pop("auto_map", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain(config: PretrainedConfig) -> None:
    """Drop what a loader left in the config: how the checkpoint was quantized, and where it was read from."""
    for field in ("quantization_config", "compression_config", "_model_name_or_path"):
        if field in vars(config):
            delattr(config, field)


def _quantization(config: Mapping[str, Any]) -> Any:
    """What a config.json, or a part of it, says of how the checkpoint is quantized, if it does."""
    return config.get("quantization_config") or config.get("compression_config")


def no_tensor(model: str, name: str) -> PopcompileError:
    return PopcompileError(f"{model}: no tensor {name}; the checkpoint does not fit its config.json")
