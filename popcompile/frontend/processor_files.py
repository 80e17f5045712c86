"""What a vision-language checkpoint's processor is configured by: files of JSON that say how images become pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from popcompile.errors import PopcompileError
from popcompile.frontend.folder_configs import private_copy
from popcompile.loading import quiet, read_json, reading

PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]


def read_processor(model: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The processor's files of the checkpoint in `folder`, by name, without fields that name code.

    Raises PopcompileError where none of them describes an image processor that transformers has.
    """
    found = {name: read_json(model, folder / name) for name in PROCESSOR_FILES if (folder / name).exists()}
    if not found:
        raise PopcompileError(
            f"{model}: has no {PROCESSOR_FILES[0]}, which says how images become pixels; add the file, or take the text"
            " decoder alone: --text-only"
        )
    problem = "the image processor cannot be loaded"
    with private_copy(model, folder, PROCESSOR_FILES) as copy, quiet(), reading(model, problem):
        AutoImageProcessor.from_pretrained(copy, trust_remote_code=False, local_files_only=True)
    return {name: {k: v for k, v in content.items() if k != "auto_map"} for name, content in found.items()}
