"""The configs of a checkpoint's folder: checked before transformers interprets them, and read from a private copy.

transformers reads more of a folder than it is asked for, code included. What it is shown here is a copy that holds the
one file, or the tokenizer's files, and no code; only with `trust_remote_code` it sees the folder itself.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.frontend.decoders import SUPPORTED, WITH_IMAGES, require_decoder
from popcompile.frontend.text_config import check_text_config, check_vision_config, text_config
from popcompile.loading import TABLE_BYTES, read_file, read_json, reading, require_regular

TOKENIZER_FILES = [
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "additional_chat_templates/*"),
]


def folder_config(
    model: str, folder: Path, trust_remote_code: bool, text_only: bool = False
) -> tuple[PretrainedConfig, PretrainedConfig | None, dict[str, Any]]:
    """The checked config of a decoder, that of the multimodal model that it is a part of, and the plain config.json.

    text_only: take the text decoder's config out of a multimodal model's; otherwise that is refused. Raises
    PopcompileError.
    """
    require_regular(model, folder / "config.json")
    if not (folder / "config.json").is_file():
        hint = f"; to read {ggufs[0]} give --gguf-file {ggufs[0]}" if (ggufs := files_in(folder, "*.gguf")) else ""
        raise PopcompileError(f"{model}: no config.json{hint or '; give the folder of a transformers checkpoint'}")
    raw = read_json(model, folder / "config.json")
    subject = f"{model}: config.json"
    kind = str(raw.get("model_type") or "")
    remote = bool(raw.get("auto_map"))
    if remote and kind not in CONFIG_MAPPING and not trust_remote_code:
        raise PopcompileError(f"{model}: model type {kind} is code in the checkpoint; to run it: --trust-remote-code")
    if kind not in CONFIG_MAPPING and not remote:
        known = f"transformers {transformers.__version__} does not know model type {kind}" if kind else "no model_type"
        raise PopcompileError(f"{subject}: {known}; {SUPPORTED}")
    if raw.get("configuration_files"):
        raise PopcompileError(
            f"{subject}: configuration_files names other configs; leave the one to use in config.json"
        )
    cls = CONFIG_MAPPING.get(kind, PretrainedConfig)
    config_schema.check_names(subject, raw, cls)
    config_schema.check_fields(subject, raw, config_schema.config_hints(cls))
    config_schema.check_end(subject, raw)
    if text_only or kind in WITH_IMAGES:
        check_text_config(subject, raw)
    if kind in WITH_IMAGES and not text_only:
        check_vision_config(subject, raw, cls)
    whole = None
    with reading(model, "config.json is malformed"):
        if remote and trust_remote_code:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        else:
            with private_copy(model, folder, []) as copy:
                config = AutoConfig.from_pretrained(copy, trust_remote_code=False, local_files_only=True)
            vars(config).pop("auto_map", None)  # it would make readers of the package ask for code
        if text_only and (text := text_config(config)) is not None:
            config, whole = text, config
        require_decoder(model, config, whole)
        config_schema.check_sizes(subject, config)
        if kind in WITH_IMAGES and whole is None:
            config_schema.check_sizes(f"{subject}: text_config", config.get_text_config(decoder=True))
        config.to_json_string()  # what the package will hold
    return config, whole, raw


def generation_config(model: str, folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The folder's own, or the one that transformers derives from the config. Raises PopcompileError."""
    file = folder / "generation_config.json"
    require_regular(model, file)
    with reading(model, "generation_config.json is malformed"):
        if not file.is_file():
            return GenerationConfig.from_model_config(config)
        raw = read_json(model, file)
        subject = f"{model}: {file.name}"
        config_schema.check_names(subject, raw, GenerationConfig)
        config_schema.check_fields(subject, raw, config_schema.GENERATION)
        config_schema.check_end(subject, raw)
        loaded = GenerationConfig.from_pretrained(folder, local_files_only=True)
        loaded.to_json_string()  # what the package will hold
        return loaded


@contextlib.contextmanager
def private_copy(model: str, folder: Path, patterns: list[str] = TOKENIZER_FILES) -> Iterator[Path]:
    """A folder with the config.json and what `patterns` match, checked, for transformers to load: no code beside it."""
    names = {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()}
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        content = read_json(model, folder / "config.json")
        (copy / "config.json").write_text(json.dumps(content), encoding="utf-8")
        for name in sorted(names):
            require_regular(model, folder / name)
            (copy / name).parent.mkdir(exist_ok=True)
            if name.name == "tokenizer_config.json":
                content = _tokenizer_config(model, folder / name)
                (copy / name).write_text(json.dumps(content), encoding="utf-8")
            else:
                (copy / name).write_bytes(read_file(model, folder / name, TABLE_BYTES))
        yield copy


def processor_template(model: str, folder: Path) -> str | None:
    """The chat template that a multimodal model's processor keeps beside the tokenizer's, if it does, in a file that
    tokenizers do not read. Raises PopcompileError.
    """
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    template = read_json(model, file, TABLE_BYTES).get("chat_template")
    if not isinstance(template, str):
        raise PopcompileError(f"{model}: {file.name} has no chat_template; fix it, or remove the file")
    return template


def _tokenizer_config(model: str, file: Path) -> dict[str, Any]:
    content = read_json(model, file, TABLE_BYTES)
    subject = f"{model}: {file.name}"
    config_schema.check_types(subject, content, config_schema.TOKENIZER)
    if any(Path(name).name != name for name in content.get("fast_tokenizer_files") or ()):
        raise PopcompileError(f"{subject}: fast_tokenizer_files names files elsewhere; name files of the folder")
    return content


def files_in(folder: Path, *patterns: str) -> list[str]:
    """The names of the files that match a pattern, sorted."""
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
