"""transformers' configs and tokenizer of a package, made of the bytes that its manifest means; none of its code is run.

transformers' own `from_pretrained` looks for further files in a folder, and asks on the terminal whether it may run
code that a config names; `from_dict` does neither.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.loading import quiet, reading
from popcompile.package.integrity import read_file, require_only_listed
from popcompile.package.manifest import PASSES, REPORT, Manifest, read_manifest

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
#: how families call the number of layers
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_config(folder: Path, manifest: Manifest) -> PretrainedConfig:
    """The model's config; of a model type that is code of the checkpoint, a plain one with the same fields.

    Raises PopcompileError for one that does not belong to the manifest, or that transformers refuses.
    """
    data = _read(folder, manifest, CONFIG)
    if data.get("model_type") != manifest.model_type:
        raise PopcompileError(f"{folder}: {CONFIG} is of another model type than the manifest; convert the model again")
    if wrong := [name for name in _LAYERS if data.get(name) not in (None, manifest.num_layers)]:
        raise PopcompileError(
            f"{folder}: {CONFIG} says {wrong[0]} {str(data[wrong[0]])[:40]!r}, the manifest {manifest.num_layers};"
            " convert the model again"
        )
    try:
        kind = CONFIG_MAPPING[manifest.model_type]  # which has no `get`
    except KeyError:
        kind = PretrainedConfig
    with quiet(), reading(str(folder), f"{CONFIG} does not load"):
        config: PretrainedConfig = kind.from_dict(data)
        config.name_or_path = str(folder)
        return config


def read_generation_config(folder: Path, manifest: Manifest, config: PretrainedConfig) -> GenerationConfig:
    """The model's, or where the package has none what `config` says. Raises PopcompileError."""
    if GENERATION_CONFIG not in manifest.files:
        return GenerationConfig.from_model_config(config)
    data = _read(folder, manifest, GENERATION_CONFIG)
    config_schema.check_fields(f"{folder}: {GENERATION_CONFIG}", data, config_schema.GENERATION)
    with quiet(), reading(str(folder), f"{GENERATION_CONFIG} does not load"):
        return GenerationConfig.from_dict(data)


def load_tokenizer(folder: Path, manifest: Manifest | None = None) -> PreTrainedTokenizerBase:
    """The package's tokenizer, made of the files that its manifest means.

    manifest: of the model that it is for, where that is loaded already. Raises PopcompileError where the package has
    none, or is another one by now.
    """
    there = read_manifest(folder)
    if manifest is not None and there != manifest:
        raise PopcompileError(f"{folder}: was replaced while it was loaded; load it again")
    require_only_listed(folder, there.files)
    if TOKENIZER_CONFIG in there.files:
        data = _read(folder, there, TOKENIZER_CONFIG)
        config_schema.check_types(f"{folder}: {TOKENIZER_CONFIG}", data, config_schema.TOKENIZER)
    others = {*there.graphs.values(), there.weights, REPORT}
    with tempfile.TemporaryDirectory(prefix="popcompile-", ignore_cleanup_errors=True) as temporary, quiet():
        for name in there.files:
            if name not in others and not name.startswith(f"{PASSES}/"):
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_file(folder, there, name))
        try:
            with reading(str(folder), "its tokenizer does not load"):
                tokenizer = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)
        except PopcompileError as error:
            raise PopcompileError(
                f"{folder}: the package has no usable tokenizer; convert a model that comes with one"
            ) from error
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _read(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    try:
        data = json.loads(read_file(folder, manifest, name))
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{folder}: {name} is not JSON; convert the model again") from error
    if not isinstance(data, dict):
        raise PopcompileError(f"{folder}: {name} is not a JSON object; convert the model again")
    return data
