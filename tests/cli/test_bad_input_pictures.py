"""Bad input to `popcompile evaluate --images`: one line on stderr with cause and fix, status 2, nothing changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import Cli
from resign import sign
from vision_checkpoint import save_pictures

from popcompile.package.manifest import read_manifest

QUESTION = '{"image": "a.png", "question": "w9"}\n'


@pytest.fixture
def package(vision_package: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(vision_package, tmp_path / "out"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "pictures")[0].parent


def make(path: Path, content: bytes | None = None) -> Path:
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nowhere", "no such folder; give a folder with pictures"),
    "empty": (lambda folder: make(folder / "empty"), "has no pictures; give a folder with .png, .jpg"),
    "a picture": (lambda folder: folder / "pictures" / "a.png", "is a file; give the folder that it is in"),
    "texts": (lambda folder: make(make(folder / "texts") / "a.txt", b"w9").parent, "has no pictures"),
    "no picture": (lambda folder: make(make(folder / "new") / "a.png", b"w9").parent, "no picture that can be read"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, cli: Cli, package: Path, pictures: Path, tmp_path: Path) -> None:
    folder, words = FOLDERS[case]
    assert words in cli.refuses("evaluate", package, "--images", folder(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no text; give a file with some"),
        (b"\xff", "is not UTF-8"),
        (b"w9\n", "line 1: is not JSON"),
        (QUESTION.encode() + b"\n[1]\n", 'line 3: has no image; give {"image": file, "question": text}'),
        (b'{"question": "w9"}', "line 1: has no image"),
        (b'{"image": "a.png"}', "line 1: has no question"),
        (b'{"image": "a.png", "question": " "}', "line 1: has no question"),
        (b'{"image": 7, "question": "w9"}', "line 1: has no image"),
        (b'{"image": "a.png", "question": "w9", "answer": 42}', "line 1: has an answer that is no text"),
        (b'{"image": "a.png", "question": "w9 \\ud800"}', "line 1: holds a lone surrogate"),
        (b'{"image": "c.png", "question": "w9"}', "c.png: cannot be read"),
        (b'{"image": "a.png\\u0000", "question": "w9"}', "cannot be read"),
    ],
)
def test_questions(content: bytes, words: str, cli: Cli, package: Path, pictures: Path, tmp_path: Path) -> None:
    file = make(tmp_path / "questions.jsonl", content)
    assert words in cli.refuses("evaluate", package, "--images", pictures, "--questions", file)


@pytest.mark.parametrize(("name", "words"), [("nowhere.jsonl", "no such file"), (".", "is a folder")])
def test_files_that_are_none(name: str, words: str, cli: Cli, package: Path, pictures: Path, tmp_path: Path) -> None:
    assert words in cli.refuses("evaluate", package, "--images", pictures, "--questions", tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a.txt"], "--images asks about pictures instead of text; leave out --text and --run-code"),
        (["--run-code"], "leave out --text and --run-code"),
        (["--tasks", "hellaswag"], "leave out --text, --images, --baselines"),
        (["--prompts", "0"], "--prompts"),
        (["--continuation-tokens", "490"], "tokens, and with 490 after them more than the model's context of 512"),
        (["--provider", "tpu"], "choose one of cpu"),
        (["--reference", "nowhere"], "nowhere: no such package folder"),
    ],
)
def test_arguments(arguments: list[str], words: str, cli: Cli, package: Path, pictures: Path) -> None:
    assert words in cli.refuses("evaluate", package, "--images", pictures, *arguments)


def test_questions_without_pictures(cli: Cli, package: Path, tmp_path: Path) -> None:
    file = make(tmp_path / "questions.jsonl", QUESTION.encode())
    line = cli.refuses("evaluate", package, "--questions", file)
    assert "--questions is for --images, a folder with the pictures; give both, or neither" in line


def test_a_model_of_text(cli: Cli, tiny_package: Path, pictures: Path) -> None:
    line = cli.refuses("evaluate", tiny_package, "--images", pictures)
    assert "takes no images, or was converted with --text-only" in line


def test_a_reference_of_text(cli: Cli, package: Path, pictures: Path, tiny_package: Path) -> None:
    sign(package, vocab_size=read_manifest(tiny_package).vocab_size, context_length=8)
    line = cli.refuses("evaluate", package, "--images", pictures, "--reference", tiny_package)
    assert f"--reference {tiny_package}: takes no images; give a package whose model does" in line


def test_prompts_that_lose_nothing(cli: Cli, package: Path, pictures: Path) -> None:
    sign(package, window=100)
    line = cli.refuses("evaluate", package, "--images", pictures)
    assert "and the package encodes prompts of up to 100 in full, which loses nothing; give larger pictures" in line


def test_a_package_without_its_processor(cli: Cli, package: Path, pictures: Path) -> None:
    (package / "preprocessor_config.json").unlink()
    sign(package)
    assert "has no processor of images; convert" in cli.refuses("evaluate", package, "--images", pictures)


def test_a_graph_that_computes_nothing_finite(cli: Cli, package: Path, pictures: Path) -> None:
    """Found before a token is drawn from it."""
    weights = package / "weights.onnx.data"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    sign(package)
    assert "the graphs compute NaN or infinity on this prompt" in cli.refuses("evaluate", package, "--images", pictures)
