"""What a package says of its image processor, for other runtimes than transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from vision_checkpoint import PROCESSOR

from popcompile.frontend.processor_files import read_processor

FILES = {
    "of its own": {"preprocessor_config.json": PROCESSOR},
    "the processor's": {
        "processor_config.json": {"processor_class": PROCESSOR["processor_class"], "image_processor": PROCESSOR}
    },
}


@pytest.mark.parametrize("file", FILES)
def test_defaults_are_stated(file: str, vision_checkpoint: Path, tmp_path: Path) -> None:
    """transformers.js does not normalize, and scales bilinearly, where nobody says so; the checkpoint's words stay."""
    shutil.copy(vision_checkpoint / "config.json", tmp_path)
    for name, content in FILES[file].items():
        (tmp_path / name).write_text(json.dumps(content))
    stated = read_processor("model", tmp_path)["preprocessor_config.json"]
    defaults = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    assert not defaults.keys() & PROCESSOR.keys()
    assert stated.pop("image_processor_type").removesuffix("Fast") == "Qwen2VLImageProcessor"
    said = {name: value for name, value in PROCESSOR.items() if name != "image_processor_type"}
    assert stated == stated | said | defaults
