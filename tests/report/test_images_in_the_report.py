"""What the report of a vision-language model's package says of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bad_input import Cli
from measured_report import save

from popcompile.package.manifest import REPORT
from popcompile.report.images import ImageFlops
from popcompile.report.page import html_report

#: of a prompt, the tower's FLOPs are as many as a third of the full decoder's
FLOPS = {
    "reference_sizes": {"prefill": {"sequence": 1024}}, "vision": {"image_tokens": 256, "flops": 3 * 10**9},
    "full_prefill_one_logit": 9 * 10**9, "pop_prefill": 6 * 10**9,
}  # fmt: skip


@pytest.fixture
def package(vision_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vision_package, tmp_path / "out"))


def test_shares() -> None:
    images = ImageFlops.of(FLOPS)
    assert images is not None and images.speedup == 12 / 9
    assert images.words() == (
        "3.0 G for an image of 256 tokens, none of it pruned: 33.3% of a prompt of 1,024 tokens with this image, 25.0%"
        " of the full model's; both together 1.33x fewer"
    )
    assert images.rows()[1] == [
        ["vision, an image of 256 tokens", "3.0", "25.0%", "3.0", "33.3%"],
        ["decoder, 1,024 tokens with it", "9.0", "75.0%", "6.0", "66.7%"],
        ["both", "12.0", "100.0%", "9.0", "100.0%"],
    ]
    assert ImageFlops.of({name: value for name, value in FLOPS.items() if name != "vision"}) is None


def test_flops_of_the_tower(vision_package: Path, cli: Cli) -> None:
    images = ImageFlops.of(json.loads((vision_package / REPORT).read_text())["flops"])
    assert images is not None and images.image_tokens == 256 and images.vision > 10**8
    shown = " ".join(cli.run("inspect", vision_package)[1].split())
    assert f"vision FLOPs {images.words()}" in shown
    assert "graphs prefill.onnx and decode.onnx, for embeddings of text and images, which vision.onnx and" in shown
    page = html_report(vision_package)
    assert f"{images.speedup:.2f}x</strong><span>fewer with vision, an image of 256 tokens" in page
    assert f"with it, the prompt takes {images.speedup:.2f} times fewer FLOPs" in page
    assert "decoder, 1,024 tokens with it" in page


def test_a_report_without_the_tower(package: Path, cli: Cli) -> None:
    """Of a package that was made before it was counted."""
    flops = json.loads((package / REPORT).read_text())["flops"]
    del flops["vision"]
    save(package, {"flops": flops})
    assert "vision FLOPs" not in cli.run("inspect", package)[1]
    assert "Vision and decoder" not in html_report(package)


def test_a_text_model_has_no_such_rows(tiny_package: Path, cli: Cli) -> None:
    shown = cli.run("inspect", tiny_package)[1]
    assert "vision" not in shown and "embedding.onnx" not in shown
    assert "Vision" not in html_report(tiny_package)


def test_a_tower_of_another_shape(package: Path, cli: Cli) -> None:
    flops = json.loads((package / REPORT).read_text())["flops"]
    save(package, {"flops": flops | {"vision": [1]}})
    assert "report.json is not a report of this popcompile" in cli.refuses("inspect", package)
