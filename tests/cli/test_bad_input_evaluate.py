"""Bad input to `popcompile evaluate`: one line on stderr with cause and fix, status 2, nothing changed on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bad_input import Cli, popcompile, save_model, snapshot

from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.evaluation.compare import evaluate

WORDS = "the cat sat w1 w2 w3 w4 w5 " * 20
SMALL = ["--prompts", "1", "--prompt-tokens", "20", "--continuation-tokens", "4", "--greedy-prompts", "0"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "has no text"),
        ("short.txt", b"the cat sat", "has 3 tokens of text and one window needs 24"),
        ("latin1.txt", b"caf\xe9", "is not UTF-8"),
        ("binary.txt", bytes(range(256)), "is not UTF-8"),
        ("lines.jsonl", b"the cat\n", "line 1: is not JSON"),
        ("fields.jsonl", b'{"text": "the cat"}\n{"label": 1}\n', "line 2: has no text"),
    ],
)
def test_text_files(name: str, content: bytes | None, words: str, cli: Cli, package: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    line = cli.refuses("evaluate", package, *SMALL, "--text", path)
    assert words in line and name in line


def test_a_folder_as_text(cli: Cli, package: Path, tmp_path: Path, text: Path) -> None:
    assert "is a folder" in cli.refuses("evaluate", package, *SMALL, "--text", text, tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads every file")
def test_text_without_permission(cli: Cli, package: Path, text: Path) -> None:
    text.chmod(0)
    assert "make it readable" in cli.refuses("evaluate", package, *SMALL, "--text", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "0"], "at least 1"),
        (["--prompts", "many"], "--prompts"),
        (["--prompts", "-3"], "--prompts"),
        (["--prompt-tokens", "1.5"], "--prompt-tokens"),
        (["--continuation-tokens", "0"], "--continuation-tokens"),
        (["--continuation-tokens", "99999999999"], "--continuation-tokens"),
        (["--greedy-tokens", "0"], "--greedy-tokens"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--prompt-tokens", "61"], "context of 64"),  # and 4 after them
        (["--continuation-tokens", "60"], "context of 64"),
        (["--provider", "tpu"], "choose one of cpu"),
        (["--text"], "--text"),
        (["--limit", "3"], "--limit and --include-path are for --tasks"),
        (["--include-path", "."], "--limit and --include-path are for --tasks"),
        (["--tasks", "hellaswag", "--baselines"], "leave out --text, --images, --baselines, --reference"),
        (["--tasks", "hellaswag", "--run-code"], "and --run-code"),
        (["--code-problems", "3"], "--code-problems is for --run-code"),
        (["--run-code", "--code-problems", "0"], "--code-problems"),
        (["--run-code", "--code-problems", "3"], "--run-code: prompts of up to"),  # in a context of 64
        (["--reference", "nowhere"], "nowhere: no such package folder"),
        (["--tasks", "hellaswag", "--limit", "0"], "--limit"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_arguments(arguments: list[str], words: str, cli: Cli, package: Path, text: Path) -> None:
    given = [] if arguments[0] in ("--tasks", "--text") else ["--text", str(text)]
    assert words in cli.refuses("evaluate", package, *SMALL, *given, *arguments)


def test_default_sizes_of_a_model_with_a_short_context(cli: Cli, package: Path, text: Path) -> None:
    assert "--prompt-tokens 256" in cli.refuses("evaluate", package, "--text", text)


def test_folders_that_are_no_packages(cli: Cli, package: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").mkdir()
    for extra in ([], ["--save"], ["--tasks", "hellaswag"]):
        given = [] if "--tasks" in extra else ["--text", str(text)]
        assert "no such package folder" in cli.refuses("evaluate", tmp_path / "missing", *SMALL, *given, *extra)
        assert "not a popcompile package" in cli.refuses("evaluate", tmp_path / "empty", *SMALL, *given, *extra)
        assert "no such package folder" in cli.refuses("evaluate", text, *SMALL, *given, *extra)
    (package / "decode.onnx").write_bytes(b"damaged")
    assert "decode.onnx is not the file" in cli.refuses("evaluate", package, *SMALL, "--text", text)


def test_a_package_without_a_tokenizer(cli: Cli, tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    convert(tmp_path / "model", tmp_path / "bare", prune=1)
    assert "no usable tokenizer" in cli.refuses("evaluate", tmp_path / "bare", *SMALL, "--text", text)


def test_a_place_that_cannot_be_saved_to_is_found_before_any_work(cli: Cli, package: Path, text: Path) -> None:
    """Without --save the text would be the complaint."""
    text.write_text("", encoding="utf-8")
    package.parent.chmod(0o500)
    try:
        if os.access(package.parent, os.W_OK):
            pytest.skip("root writes everywhere")
        line = cli.refuses("evaluate", package, *SMALL, "--text", text, "--save")
    finally:
        package.parent.chmod(0o700)
    assert "no permission" in line


def test_the_api_checks_its_numbers(package: Path, text: Path) -> None:
    for arguments in ({"prompts": 0}, {"prompt_tokens": -1}, {"seed": -1}, {"greedy_prompts": -1}):
        with pytest.raises(PopcompileError, match=r"is not a number of at least|is not a seed"):
            evaluate(package, [text], **arguments)


def test_what_a_user_types(package: Path, text: Path) -> None:
    """A process of its own, for nothing may slip past: no warnings, no progress, one document."""
    before = snapshot(package.parent)
    done = popcompile("evaluate", package, *SMALL, "--text", text, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{") and done.stdout.count("\n}\n") == 1
    assert snapshot(package.parent) == before
    shown = popcompile("evaluate", "--help")
    assert shown.returncode == 0 and "example: popcompile evaluate" in shown.stdout
