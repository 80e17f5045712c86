"""What a vision-language checkpoint's processor is configured by: files of JSON that say how images become pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.frontend.folder_configs import private_copy
from popcompile.loading import quiet, read_json, reading

PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]


def read_processor(model: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The processor's files of the checkpoint in `folder`, by name, without fields that name code.

    preprocessor_config.json, which other runtimes than transformers look for, is always there and states the defaults
    of its class as well. Raises PopcompileError where none of the files describes an image processor that transformers
    has.
    """
    found = {name: read_json(model, folder / name) for name in PROCESSOR_FILES if (folder / name).exists()}
    if not found:
        raise PopcompileError(
            f"{model}: has no {PROCESSOR_FILES[0]}, which says how images become pixels; add the file, or take the text"
            " decoder alone: --text-only"
        )
    images, whole, _ = PROCESSOR_FILES
    named = {name: value for name, value in found.get(whole, {}).items() if name == "processor_class"}
    found[images] = processor_settings(model, folder) | named | found.get(images, {})
    return {name: {k: v for k, v in content.items() if k != "auto_map"} for name, content in found.items()}


def processor_settings(model: str, folder: Path) -> dict[str, Any]:
    """What the image processor in `folder` is configured by, its class's defaults included, by transformers' names.

    Raises PopcompileError where transformers has no such processor, and for a field of another type than it takes.
    """
    problem = "the image processor cannot be loaded"
    with private_copy(model, folder, PROCESSOR_FILES) as copy, quiet(), reading(model, problem):
        processor = AutoImageProcessor.from_pretrained(copy, trust_remote_code=False, local_files_only=True)
        settings: dict[str, Any] = json.loads(processor.to_json_string())
    hints = config_schema.hints_of(processor.valid_kwargs)
    config_schema.check_types(f"{model}: image processor", settings, hints)
    return settings
