"""What a vision-language checkpoint's processor is configured by: how images become pixels, in JSON beside config.json.

The files are copied as they are, without fields that name code, once transformers has made an image processor of them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import AutoImageProcessor

from popcompile.errors import PopcompileError
from popcompile.loading import quiet, read_json, reading

PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]


def write_processor(model: str, source: Path, folder: Path) -> list[str]:
    """Copy the processor's files of the checkpoint in `source`; the names of those that there are.

    Raises PopcompileError where none of them describes an image processor that transformers has.
    """
    found = {name: read_json(model, source / name) for name in PROCESSOR_FILES if (source / name).exists()}
    if not found:
        raise PopcompileError(
            f"{model}: has no {PROCESSOR_FILES[0]}, which says how images become pixels; add the file, or take the text"
            " decoder alone: --text-only"
        )
    for name, content in found.items():
        content.pop("auto_map", None)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        for name in (*found, "config.json"):
            Path(temporary, name).write_bytes((folder / name).read_bytes())
        with quiet(), reading(model, "the image processor cannot be loaded"):
            AutoImageProcessor.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)
    return list(found)
