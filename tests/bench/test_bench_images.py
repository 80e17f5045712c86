"""`popcompile bench` with images: vision, prefill and decoding apart, and runners that compute what `generate` does."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import Cli, popcompile
from PIL import Image
from vision_checkpoint import save_pictures

from popcompile.bench.images import image_sizes
from popcompile.bench.measure import bench
from popcompile.bench.runners import ImagePackageRunner
from popcompile.bench.subjects import has_genai
from popcompile.package.manifest import REPORT, read_manifest
from popcompile.report.bench import bench_text
from popcompile.report.page import html_report
from popcompile.runtime.generation import load
from popcompile.runtime.noise import make_pixels, make_prompt

LENGTHS, STEPS = [8, 24], 3
SMALL = ["--lengths", "8", "--decode-tokens", "2", "--repeats", "1", "--threads", "1"]
#: of a.png in patches 10 x 6, and of 7 and 12 tokens
SIZES = [[3, 5], [1, 7], [3, 4]]


@pytest.fixture
def package(vision_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vision_package, tmp_path / "out"))


@pytest.fixture(scope="module")
def result(vision_package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    picture = save_pictures(tmp_path_factory.mktemp("pictures") / "files")[0]
    numbers = ["--lengths", "8,24", "--decode-tokens", STEPS, "--repeats", "3", "--threads", "1", "--batch", "2"]
    done = popcompile("bench", vision_package, *numbers, "--image", picture, "--image-tokens", "7,12", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_images(result: dict[str, Any]) -> None:
    assert result["settings"]["images"] == SIZES and result["warnings"] == []
    assert [subject["name"] for subject in result["subjects"]] == ["pop", "full"]


def test_times(result: dict[str, Any]) -> None:
    seen = 15 + 7 + 12
    for subject in result["subjects"]:
        for length, row in zip(LENGTHS, subject["lengths"], strict=True):
            tokens = {"vision": seen, "prefill": length + seen, "time_to_first_token": length + seen, "decode": STEPS}
            for name, count in tokens.items():
                assert row[name]["tokens_per_second"] == pytest.approx(2 * count / row[name]["median"])
                assert row[name]["median"] == statistics.median(row[name]["seconds"])
            parts = (row[name]["seconds"] for name in ("vision", "prefill", "time_to_first_token"))
            for vision, prefill, first in zip(*parts, strict=True):
                assert vision > 0 and vision + prefill < first
    assert {"vision", "prefill", "time_to_first_token", "decode"} < set(result["ratios"][0])


def test_table(result: dict[str, Any]) -> None:
    text = bench_text(result)
    assert "prompts: 3 images of 15+7+12 tokens beside their tokens of text" in text and "of first token" in text
    row = result["subjects"][0]["lengths"][1]
    (line,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["24", "pop"]]
    assert line[5] == f"{100 * row['vision']['median'] / row['time_to_first_token']['median']:.1f}%"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_runner_generates_what_generate_does(batch: int, vision_package: Path) -> None:
    """Of the same noise, from the processor's form of it."""
    ids = np.random.default_rng(batch).integers(90, size=(batch, 20)).tolist()
    runner = ImagePackageRunner(vision_package, "cpu", 1, SIZES)
    prompt = runner.encode(ids)
    runner.begin(prompt, 4)
    runner.see(prompt)
    runner.prefill(prompt)
    found = np.array([runner.pick(), *(runner.step() for _ in range(4))]).T

    model = load(vision_package)
    inputs = model.manifest.images
    assert inputs is not None
    sizes = [(rows, columns) for rows, columns in SIZES]
    rows = torch.stack([make_prompt(inputs, torch.tensor(row), sizes)[0] for row in ids])
    pixels, grids = make_pixels(model.runtime, sizes * batch, seed=0)
    generated = model.generate(
        rows, pixel_values=pixels, image_grid_thw=grids, max_new_tokens=5, min_new_tokens=5, do_sample=False,
        prefill="pop", eos_token_id=None,
    )  # fmt: skip
    assert generated[:, rows.shape[1] :].tolist() == found.tolist()
    runner.end()


def test_prompts_of_text_alone(vision_package: Path) -> None:
    found = bench(vision_package, lengths=[8], decode_tokens=2, repeats=1, threads=1)
    assert found["settings"]["images"] == [] and "vision" not in found["subjects"][0]["lengths"][0]


def test_what_is_saved_is_shown(cli: Cli, package: Path) -> None:
    assert f"`popcompile bench {package} --image-tokens 256 --save` measures it" in shown(cli, package)
    assert f"popcompile bench {package} --image-tokens 256 --save" in html_report(package)
    status, out, err = cli.run("bench", package, *SMALL, "--image-tokens", "6", "--save", "--json")
    assert (status, err) == (0, "")
    assert json.loads((package / REPORT).read_text())["benchmark_images"] == json.loads(out)
    words = shown(cli, package)
    assert "with images, 8 tokens 1 image of 6 tokens: " in words and "of it vision; full model" in words
    assert f"first token not measured; `popcompile bench {package} --save` measures it" in words  # of text alone
    assert "image_time" not in json.loads(cli.run("inspect", package, "--json")[1])["not_measured"]
    assert "1 image of 6 tokens in every prompt" in html_report(package)
    assert cli.run("verify", package)[0] == 0


def shown(cli: Cli, package: Path) -> str:
    return " ".join(cli.run("inspect", package)[1].split())


@pytest.mark.parametrize(("tokens", "size"), [(1, (1, 1)), (12, (3, 4)), (13, (1, 13)), (256, (16, 16))])
def test_the_size_of_an_image_of_so_many_tokens(tokens: int, size: tuple[int, int], vision_package: Path) -> None:
    assert image_sizes(vision_package, read_manifest(vision_package), [], [tokens]) == [size]


def test_images_of_one_size(cli: Cli, gemma_vision_package: Path, tmp_path: Path) -> None:
    """As many tokens as they have, whatever the picture's size."""
    manifest, files = read_manifest(gemma_vision_package), [str(file) for file in save_pictures(tmp_path / "files")]
    assert image_sizes(gemma_vision_package, manifest, files, [16]) == [(1, 16)] * 3
    line = cli.refuses("bench", gemma_vision_package, *SMALL, "--image-tokens", "16,9")
    assert "--image-tokens 9: all images of this model have 16 tokens; give that" in line
    rows = bench(gemma_vision_package, lengths=[8], decode_tokens=1, repeats=1, threads=1, image_tokens=[16])[
        "subjects"
    ]
    assert all(row["lengths"][0]["vision"]["median"] > 0 for row in rows)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image-tokens", "0"], "is not a list of numbers of at least 1"),
        (["--image-tokens", "6;6"], "is not a list of numbers of at least 1"),
        (["--image"], "expected one argument"),
        (["--image", "missing.png"], "missing.png: cannot be read"),
        (["--image", "https://example.com/a.png"], "an address, and popcompile reads files"),
        (["--image-tokens", "200,303"], "--lengths 8, images of 503 tokens and --decode-tokens 2 are more than the"),
        (["--image-tokens", "999999999"], "are more than the context of 512"),
    ],
)
def test_arguments(arguments: list[str], words: str, cli: Cli, package: Path) -> None:
    assert words in cli.refuses("bench", package, *SMALL, *arguments)


def test_a_picture_that_is_none(cli: Cli, package: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    assert "no picture that can be read" in cli.refuses("bench", package, *SMALL, "--image", tmp_path / "text.png")


def test_pictures_that_the_processor_refuses(cli: Cli, package: Path, tmp_path: Path) -> None:
    """So much longer than wide that nothing could be seen."""
    Image.new("RGB", (2000, 4)).save(tmp_path / "line.png")
    assert "its processor refuses the pictures" in cli.refuses(
        "bench", package, *SMALL, "--image", tmp_path / "line.png"
    )


def test_models_of_text(cli: Cli, package: Path, tiny_package: Path) -> None:
    line = cli.refuses("bench", tiny_package, *SMALL, "--image-tokens", "6")
    assert "takes no images, or was converted with --text-only; leave --image and --image-tokens out" in line
    line = cli.refuses("bench", package, *SMALL, "--image-tokens", "6", "--against", tiny_package)
    assert f"--against {tiny_package}: takes no images of these sizes; leave it out" in line


def test_other_runtimes(cli: Cli, package: Path, tiny_package: Path) -> None:
    others = [["--against", tiny_package / "decode.onnx"]]
    others += [["--runtime", "onnxruntime-genai"]] if has_genai() else []
    for other in others:
        line = cli.refuses("bench", package, *SMALL, "--image-tokens", "6", *other)
        assert "bench gives images to packages in popcompile's own runtime and to checkpoints alone" in line
