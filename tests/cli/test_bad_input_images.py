"""Pictures that are none, and models and packages that cannot take them: one line, exit status 2."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import Cli
from PIL import Image
from vision_checkpoint import draw_picture

ASK = ("--prompt", "w9 w10", "--max-new-tokens", 2)


def save_truncated(file: Path) -> None:
    whole = draw_picture(file, 64, 64).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def save_animated(file: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:])


PICTURES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "none": ("a.png", lambda file: file.write_text("no picture"), "no picture that can be read"),
    "empty": ("a.png", lambda file: file.write_bytes(b""), "no picture that can be read"),
    "truncated": ("a.png", save_truncated, "no picture that can be read"),
    "one pixel wide": (
        "a.png",
        lambda file: draw_picture(file, 1, 40),
        "has 1 x 40 pixels; give a picture",
    ),
    "30,000 pixels wide": (
        "a.png",
        lambda file: draw_picture(file, 30_000, 2),
        "has 30,000 x 2 pixels; make",
    ),
    "too narrow": ("a.png", lambda file: draw_picture(file, 2, 600), "its processor refuses the prompt"),
    "of print": ("a.jpg", lambda file: Image.new("CMYK", (32, 32)).save(file), "is in CMYK"),
    "animated": ("a.gif", save_animated, "has 3 frames; give a still picture"),
    "a folder": ("a.png", lambda file: file.mkdir(), "cannot be read"),
    "missing": ("a.png", lambda file: None, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(case: str, vision_package: Path, tmp_path: Path, cli: Cli) -> None:
    name, make, line = PICTURES[case]
    make(tmp_path / name)
    refused = cli.refuses("run", vision_package, "--image", tmp_path / name, *ASK)
    assert line in refused and (case == "too narrow" or str(tmp_path / name) in refused)


def test_an_address(vision_package: Path, cli: Cli) -> None:
    refused = cli.refuses("run", vision_package, "--image", "https://example.org/a.png", *ASK)
    assert "https://example.org/a.png: an address, and popcompile reads files; download it" in refused


def test_models_without_images(tiny_package: Path, vision_package: Path, tmp_path: Path, cli: Cli) -> None:
    picture = draw_picture(tmp_path / "a.png", 32, 32)
    assert "takes no images" in cli.refuses("run", tiny_package, "--image", picture, *ASK)
    assert "leave --raw out" in cli.refuses("run", vision_package, "--raw", "--image", picture, *ASK)


@pytest.mark.parametrize("name", ["vision.onnx", "embedding.onnx", "preprocessor_config.json"])
def test_packages_without_a_part(name: str, vision_package: Path, tmp_path: Path, cli: Cli) -> None:
    package = Path(shutil.copytree(vision_package, tmp_path / "out"))
    (package / name).unlink()
    assert f"{name} is missing; convert the model again" in cli.refuses("run", package, *ASK)


def test_a_chat_goes_on(vision_package: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a picture that cannot be read, which is forgotten."""
    picture = draw_picture(tmp_path / "a.png", 40, 24)
    lines = f"/image {tmp_path / 'none.png'}\n/image {picture}\nw9 w10\nw11\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = cli.run("run", vision_package, "--chat", "--max-new-tokens", 2)
    assert status == 2 and len(out.splitlines()) == 2
    refused, *timings = err.splitlines()
    assert "none.png: cannot be read" in refused and len(timings) == 2
    first, second = (int(timing.split()[0]) for timing in timings)
    assert first >= 11 and second >= first + 5  # an image of six tokens between its marks, and words of the template


# --- conversion ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(vision_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(vision_checkpoint, tmp_path / "model"))


def changed(checkpoint: Path, name: str, change: Callable[[dict], object]) -> None:
    content = json.loads((checkpoint / name).read_text())
    change(content)
    (checkpoint / name).write_text(json.dumps(content))


CONFIGS: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "vision is none": ("config.json", lambda c: c.update(vision_config=3), "vision_config is '3', not an object"),
    "vision of words": ("config.json", lambda c: c["vision_config"].update(depth="two"), "vision_config: depth is"),
    "deep vision": ("config.json", lambda c: c["vision_config"].update(depth=10**6), "depth is 1000000, more than"),
    "another patch": ("config.json", lambda c: c["vision_config"].update(patch_size=4), "belong to different models"),
    "no heads": ("config.json", lambda c: c["vision_config"].update(num_heads=0), "cannot"),
    "unknown text": (
        "config.json",
        lambda c: c["text_config"].update(model_type="x"),
        "decoder's model type x",
    ),
    "processor": (
        "preprocessor_config.json",
        lambda c: c.update(image_processor_type="X"),
        "image processor cannot be",
    ),
    "patch of words": (
        "preprocessor_config.json",
        lambda c: c.update(patch_size="8"),
        'image processor: patch_size is "8", not an integer',
    ),
    "no sizes": ("preprocessor_config.json", lambda c: c.update(size="big"), "image processor cannot be"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    name, change, line = CONFIGS[case]
    changed(checkpoint, name, change)
    assert line in cli.refuses("convert", checkpoint, tmp_path / "out", "--layers", 3, "--kv-projection", "layer")


def test_no_processor(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    line = cli.refuses("convert", checkpoint, tmp_path / "out", "--layers", 3, "--kv-projection", "layer")
    assert "has no preprocessor_config.json" in line and line.rstrip().endswith("--text-only")
