"""transformers' configs of a package, made of the bytes that its manifest means. No code of the package is run.

transformers' own `from_pretrained` looks for further files in a folder, and asks on the terminal whether it may run
code that a config names; `from_dict` does neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

from popcompile.errors import PopcompileError
from popcompile.integrity import read_file
from popcompile.loading import quiet, reading
from popcompile.package import Manifest

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
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
    with quiet(), reading(str(folder), f"{GENERATION_CONFIG} does not load"):
        return GenerationConfig.from_dict(data)


def _read(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    try:
        data = json.loads(read_file(folder, manifest, name))
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{folder}: {name} is not JSON; convert the model again") from error
    if not isinstance(data, dict):
        raise PopcompileError(f"{folder}: {name} is not a JSON object; convert the model again")
    return data
