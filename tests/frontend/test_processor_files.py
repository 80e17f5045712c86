"""What a package says of its image processor."""

from __future__ import annotations

from pathlib import Path

from vision_checkpoint import PROCESSOR

from popcompile.frontend.processor_files import read_processor


def test_defaults_are_stated(vision_checkpoint: Path) -> None:
    """transformers.js does not normalize, and scales bilinearly, where nobody says so; the checkpoint's words stay."""
    stated = read_processor("model", vision_checkpoint)["preprocessor_config.json"]
    defaults = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    assert not defaults.keys() & PROCESSOR.keys()
    assert stated == stated | PROCESSOR | defaults
