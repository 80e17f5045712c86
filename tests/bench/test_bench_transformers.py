"""`popcompile bench --against CHECKPOINT`: transformers runs the model that a package was converted from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_input import Cli

import popcompile
from popcompile.bench.measure import bench
from popcompile.bench.runners import ImagePackageRunner, PackageRunner, Runner
from popcompile.bench.subjects import find_peers, package_subject
from popcompile.bench.transformers_runner import TransformersRunner
from popcompile.report.bench import bench_text

SMALL = ["--lengths", "8", "--decode-tokens", "2", "--repeats", "1"]
#: rows and columns of images, in tokens
Sizes = list[tuple[int, int]]
SIZES: Sizes = [(3, 4), (1, 5)]


def generated(runner: Runner, ids: list[list[int]]) -> list[list[int]]:
    prompt = runner.encode(ids)
    found = []
    for _ in range(2):  # a runner is used again
        runner.begin(prompt, 4)
        runner.see(prompt)
        runner.prefill(prompt)
        first = runner.likeliest()
        found = [runner.pick(), *(runner.step() for _ in range(4))]
        assert found[0] == first
        runner.end()
    return np.array(found).T.tolist()


@pytest.fixture(scope="module", params=["vision_checkpoint", "gemma_vision_checkpoint"])
def with_images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Sizes]:
    """A checkpoint, its package with nothing pruned, and sizes of images that it takes."""
    folder: Path = request.getfixturevalue(request.param)
    package = tmp_path_factory.mktemp("packages") / "out"
    popcompile.convert(folder, package, prune=0)
    return folder, package, [(1, 16)] if request.param == "gemma_vision_checkpoint" else SIZES


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_tokens(batch: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    popcompile.convert(tiny_checkpoint, tmp_path / "out", prune=0)
    ids = np.random.default_rng(batch).integers(60, size=(batch, 20)).tolist()
    expected = generated(PackageRunner(tmp_path / "out", "cpu", 1), ids)
    assert generated(TransformersRunner(tiny_checkpoint, "float32", "cpu", 1), ids) == expected


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_tokens_after_images(batch: int, with_images: tuple[Path, Path, Sizes]) -> None:
    folder, package, sizes = with_images
    ids = np.random.default_rng(batch).integers(60, size=(batch, 20)).tolist()
    expected = generated(ImagePackageRunner(package, "cpu", 1, sizes), ids)
    (subject,) = find_peers(package_subject("pop", package, "popcompile"), [folder], "popcompile")
    found = TransformersRunner(folder, "float32", "cpu", 1, sizes, subject.images)
    assert generated(found, ids) == expected
    other = np.random.default_rng(batch + 9).integers(60, size=(batch, 20)).tolist()
    assert generated(found, other) != expected


def test_a_peer(vision_package: Path, vision_checkpoint: Path) -> None:
    """In the table, with its version, its first token compared with the full model's."""
    result = bench(
        vision_package, [vision_checkpoint], lengths=[8], decode_tokens=2, repeats=1, threads=1, image_tokens=[6]
    )
    _, full, theirs = result["subjects"]
    assert theirs["kind"] == "transformers" and theirs["lengths"][0]["first_token"] == full["lengths"][0]["first_token"]
    assert not result["warnings"] and theirs["lengths"][0]["vision"]["median"] > 0
    assert ", transformers " in bench_text(result) and str(vision_checkpoint) in bench_text(result)


# --- bad input -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model(cli: Cli, package: Path, tiny_checkpoint: Path, vision_package: Path) -> None:
    line = cli.refuses("bench", vision_package, *SMALL, "--image-tokens", "6", "--against", tiny_checkpoint)
    assert f"--against {tiny_checkpoint}: takes no images of these sizes; leave it out" in line


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "transformers does not load its config"),
        (lambda folder: (folder / "config.json").write_text("{"), "transformers does not load its config"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "transformers does not load it"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(
    damage: object, words: str, cli: Cli, package: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    assert callable(damage)
    damage(folder)
    line = cli.refuses("bench", package, *SMALL, "--against", folder)
    assert words in line and str(folder) in line
