"""Bad options, and outputs that cannot be written: one line with cause and fix, exit status 2, nothing on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from bad_input import TIMEOUT, Cli, assert_one_line, popcompile

from popcompile.cli import _parser

linux = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")


def test_wrong_commands(cli: Cli) -> None:
    status, shown, complaint = cli.run()
    assert (status, complaint) == (0, "") and shown == cli.run("--help")[1] and "convert" in shown
    assert "invalid choice: 'compile' (choose from" in cli.refuses("compile")
    assert "unrecognized arguments: --colour" in cli.refuses("inspect", "out", "--colour")
    assert "unrecognized arguments: a b" in cli.refuses("inspect", "out", "a\nb")
    assert "required: OUT (see popcompile convert --help)" in cli.refuses("convert", "model")
    assert "required: OUT (see popcompile inspect --help)" in cli.refuses("inspect")
    assert "expected one argument" in cli.refuses("convert", "model", "out", "--prune")
    for count in ("0", "-1", "1.5", "many", "9" * 30):
        assert (
            "is not a number of at least 1"
            in cli.refuses("run", "out", "--prompt", "x", "--max-new-tokens", count)[-99:]
        )
    for option in ("--window", "--prompt-tokens"):
        for given in ("0", "-3", "1.5", "wide", "٣"):
            assert "is not a number of at least 1" in cli.refuses("convert", "model", "out", option, given)
    for heat in ("0", "-1", "nan", "hot"):
        assert "not a number between 0 and 100" in cli.refuses("run", "out", "--prompt", "x", "--temperature", heat)


def test_help_of_every_command(cli: Cli) -> None:
    status, out, err = cli.run("--help")
    assert (status, err) == (0, "")
    (commands,) = [a.choices for a in _parser()._actions if isinstance(a.choices, dict)]
    assert set(commands) >= {"convert", "inspect", "run", "verify"}
    for name in commands:
        assert name in out
        status, text, err = cli.run(name, "--help")
        assert (status, err) == (0, "") and f"example: popcompile {name}" in text


def test_version(cli: Cli) -> None:
    import popcompile as package

    assert cli.run("--version") == (0, f"popcompile {package.__version__}\n", "")
    assert package.__version__ == version("popcompile")
    assert {"convert", "load", "__version__"} <= set(dir(package))


def test_a_process_ends_as_main_says() -> None:
    done = popcompile("compile")
    assert_one_line(done.returncode, done.stdout, done.stderr)
    done = popcompile("convert", "--help")
    assert (done.returncode, done.stderr) == (0, "") and "example: popcompile convert" in done.stdout


CHOICES = [
    (["--dtype", "fp64"], "--dtype fp64: unknown; choose one of fp32, fp16, bf16, int8, int4, w8a8"),
    (["--dtype", "bf16"], "--dtype bf16: ONNX Runtime's attention has no kernels for it on cpu; choose fp32 or fp16"),
    (
        ["--provider", "cuda", "--dtype", "fp32"],
        "--dtype fp32: ONNX Runtime's attention has no kernels for it on cuda; choose fp16 or bf16",
    ),
    (
        ["--provider", "cuda", "--dtype", "w8a8"],
        "--dtype w8a8: ONNX Runtime has kernels for it on cpu, none on cuda; choose int8",
    ),
    (["--dtype", "int4", "--block-size", "48"], "--block-size 48: choose one of 16, 32, 64, 128, 256"),
    (["--dtype", ""], "--dtype : unknown; choose one of"),
    (["--provider", "tpu"], "--provider tpu: unknown; choose one of cpu, cuda"),
    (["--layout", "merged"], "--layout merged: unknown; choose one of split"),
    (["--kv-projection", "none"], "--kv-projection none: unknown; choose one of calibrated, layer"),
    (["--window", "17"], "--window 17: too large for the model's context of 64 tokens, for prompts that are no longer"),
    (["--prompt-tokens", "65"], "--prompt-tokens 65: more than the model's context of 64; give fewer"),
    (["--prompt-tokens", "1"], "--prompt-tokens 1: prompts of up to 1 tokens are encoded in full"),
    (["--prompt-tokens", "12", "--window", "12"], "prompts of up to 12 tokens are encoded in full"),
    (["--prune", "2"], "the model has 2 layers and at least one must encode the prompt; prune at most 1"),
    (["--prune", "999999999"], "prune at most 1"),
    (["--prune", "0.9"], "prune at most 1"),
    (["--prune", "-1"], "out of range; give a count of at least 0, or a fraction from 0 to below 1"),
    (["--prune", "1.5"], "out of range; give a count"),
    (["--prune", "3/2"], "out of range; give a count"),
    (["--prune=-1/2"], "out of range; give a count"),
    *((["--prune", text], "neither a count nor a fraction nor auto; for example --prune 10 or --prune 1/3") for text in
      ("abc", "1/0", "", "nan", "inf", "1e999999999", "9" * 30, "1/", "50%", "\u0663")),
    (["--layers", "2"], "there is no layer 2; the model has 0 to 1"),
    (["--layers", "0-999999"], "there is no layer 999999; the model has 0 to 1"),
    (["--layers", "1-0"], "the range 1-0 runs backwards; for example --layers 20-29"),
    *((["--layers", text], "is neither a layer nor a range; for example --layers 20-29") for text in
      ("a", "1-", "-1", "", ",", "0,,1", "0,", "0-1-1", "0x1", "1.0", "9999999", "all", "\u0663")),
    (["--layers", "0-1"], "at least one of the 2 layers must encode the prompt; prune fewer"),
    (["--layers", "1,0"], "prune fewer"),
    (["--layers", "1", "--prune", "1"], "--prune and --layers are both given"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), CHOICES, ids=[" ".join(o)[:30] for o, _ in CHOICES])
def test_wrong_choices(options: list[str], words: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    assert words in cli.refuses("convert", model, tmp_path / "new", *options)


def test_options_are_checked_before_the_place_and_the_model(cli: Cli, package: Path, tmp_path: Path) -> None:
    """In this order: what is written, the file that is named, where the package goes, the model."""
    convert = ("convert", tmp_path / "no-model", package)
    missing = ("--calibration", tmp_path / "nothing.txt")
    for option in (
        ("--prune", "lots"), ("--prune", "-1"), ("--layers", "20-"), ("--layers", "3-2"),
        ("--layers", "1", "--prune", "1"),
        ("--prune", "1", "--max-kl", "0.1"), ("--calibration-texts", "7"), ("--block-size", "3", "--dtype", "int4"),
    ):  # fmt: skip
        assert option[0] in cli.refuses(*convert, *missing, *option)
    assert "nothing.txt: no such file" in cli.refuses(*convert, *missing)
    assert "exists already" in cli.refuses(*convert, "--prune", "1")
    assert "no-model: no such folder" in cli.refuses("convert", tmp_path / "no-model", tmp_path / "new", "--prune", "1")
    for command in ("run --prompt x", "run --chat", "evaluate", "bench", "verify"):
        name, *rest = command.split()
        assert "provider tpu: unknown" in cli.refuses(name, tmp_path / "nowhere", *rest, "--provider", "tpu")
    text = tmp_path / "nothing.txt"
    for given in (["evaluate", "nowhere", "--text", text], ["analyze", "nowhere", "--text", text]):
        assert "nothing.txt: no such file" in cli.refuses(*given)
    assert "nothing.txt: cannot be read" in cli.refuses("run", "nowhere", "--prompt-file", text)
    assert "names no task" in cli.refuses("evaluate", "nowhere", "--tasks", ",")
    assert "no such folder" in cli.refuses("evaluate", "nowhere", "--tasks", "x", "--include-path", text)


# --- inspect, and who reads what it prints ---------------------------------------------------------------------


def test_inspect_options(cli: Cli, package: Path) -> None:
    for name in ("NoSuch", "", "*"):
        line = cli.refuses("inspect", package, "--pass", name)
        assert "no such pass; the passes are " in line and "PrunePrefill" in line
    for name in ("PrunePrefill", ""):
        assert "give one of them" in cli.refuses("inspect", package, "--json", "--pass", name)
    status, out, err = cli.run("inspect", package, "--pass", "pruneprefill")
    assert (status, err) == (0, "") and "# prefill after PrunePrefill" in out
    assert out.startswith("# PrunePrefill: Let the prompt bypass the pruned layers.\n")


def test_json_is_one_document(tiny_package: Path) -> None:
    done = popcompile("inspect", tiny_package, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert set(document) == {"manifest", "report", "not_measured", "runtimes"} and document["manifest"]["pruned"] == [1]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
@pytest.mark.parametrize(
    ("arguments", "into", "status", "words"),
    [
        (["inspect", "OUT"], "| head -1", 0, ""),
        (["inspect", "OUT", "--json"], "| true", 0, ""),
        (["--help"], "| true", 0, ""),
        (["inspect", "OUT"], ">&-", 0, ""),
        pytest.param(["inspect", "OUT", "--json"], "> /dev/full", 2, "the disk is full", marks=linux),
    ],
)
def test_output_that_nobody_reads(arguments: list[str], into: str, status: int, words: str, tiny_package: Path) -> None:
    """A closed pipe ends quietly; a full disk is said in one line."""
    command = " ".join([sys.executable, "-m", "popcompile", *arguments]).replace("OUT", f"'{tiny_package}'")
    script = f"set -o pipefail; {command} {into}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == status
    assert words in done.stderr and done.stderr.count("\n") == (1 if words else 0)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is no UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    return folder


def test_a_path_that_is_not_utf8(odd: Path, package: Path, model: Path, cli: Cli, tmp_path: Path) -> None:
    """It works where Python opens it, and elsewhere the line says why it does not."""
    shutil.copytree(package, odd / "package")
    shutil.copytree(model, odd / "model")
    (odd / "text.txt").write_text("the cat sat w1 w2 w3 " * 20)
    status, out, err = cli.run("inspect", odd / "package", "--html", odd / "page.html")
    assert (status, err) == (0, "") and out.endswith("\\udcff\\udcfe/page.html\n") and (odd / "page.html").exists()
    few = ("--prompts", 1, "--prompt-tokens", 20, "--continuation-tokens", 4, "--greedy-prompts", 0)
    status, out, err = cli.run("evaluate", package, *few, "--text", odd / "text.txt")
    assert (status, err) == (0, "") and "\\udcff\\udcfe/text.txt" in out
    status, out, err = cli.run(
        "analyze", model, "--texts", 1, "--tokens", 4, "--text", odd / "text.txt", "--plot", odd / "x.svg"
    )
    assert (status, err) == (0, "") and (odd / "x.svg").read_bytes().endswith(b"</svg>\n")
    for arguments in (
        ["verify", odd / "package"],
        ["run", odd / "package", "--prompt", "x"],
        ["evaluate", odd / "package", *few, "--text", odd / "text.txt"],
        ["bench", odd / "package"],
        ["bench", package, "--lengths", 8, "--against", odd / "package"],
        ["convert", odd / "model", tmp_path / "new", "--prune", 1],
        ["convert", model, odd / "new", "--prune", 1],
        ["convert", model, tmp_path / "new", "--prune", 1, "--adapter", odd / "model"],
        ["analyze", odd / "model"],
    ):
        line = cli.refuses(*arguments)
        assert (
            "its name is not UTF-8, and ONNX Runtime, safetensors and tokenizers open no such path; rename it" in line
        )
        assert "\\udcff\\udcfe" in line, line


def test_prompts_that_are_no_text(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the package is looked at."""
    assert "the prompt is not UTF-8 text (character 4)" in cli.refuses("run", "nowhere", "--prompt", "the\udcff")
    for empty in ("", "  ", "\n\t\u3000"):
        assert "the prompt is empty" in cli.refuses("run", "nowhere", "--prompt", empty)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    line = cli.refuses("run", "nowhere", "--prompt-file", tmp_path / "latin1.txt")
    assert "not UTF-8 text (" in line and "convert the file to UTF-8" in line
    line = cli.refuses("run", "nowhere", "--prompt-file", tmp_path)
    assert "cannot be read (Is a directory); give another file" in line


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX encodings")
def test_a_chat_goes_on_after_a_message_that_cannot_be_answered(tiny_package: Path) -> None:
    """Each is refused in a line, and the exit status tells at the end."""
    command = [sys.executable, "-m", "popcompile", "run", str(tiny_package), "--chat", "--max-new-tokens", "4"]
    messages = b"the \xff cat\n\n  \n" + b"the cat " * 99 + b"\n" + b"sat " * 61
    done = subprocess.run(command, input=messages, capture_output=True, timeout=TIMEOUT)
    refusals = done.stderr.decode().splitlines()
    assert done.returncode == 2 and done.stdout == b"" and len(refusals) == 3
    assert refusals[0].startswith("popcompile: error: the message is not UTF-8 text (character 5)")
    for line, tokens in zip(refusals[1:], (198, 61), strict=True):
        assert f"the chat with this message has {tokens} tokens, and with --max-new-tokens 4 more than the" in line
        assert "context of 64; write less, or begin a new chat" in line
