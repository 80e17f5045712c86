"""Every argument of every command: numbers of a kind are taken or refused alike, and no path ends in a failure of ours.

The tables are walked with the parsers, so a new option takes part by itself.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from bad_input import Cli, assert_one_line

from popcompile.arguments import COUNT, NATS, PORT, POSITIVE, RATIO, SEED, TEMPERATURE, Number
from popcompile.cli import _parser
from popcompile.errors import PopcompileError

#: what a command needs beside the option, before any work: models and packages that are not there
REQUIRED = {
    "convert": ["no-model", "no-such-out"],
    "analyze": ["no-model"],
    "run": ["no-package", "--prompt", "x"],
    "demo": [],
}
NO_WORK = ("no such folder or file", "no such package folder")
NUMBERS = [
    "0", "1", "8", "-1", "1.5", "99.9", "1e400", "nan", "inf", "-inf", "", " 1", "1_0", "+1", "0x1", "many", "٣", "1٣",
    "9" * 30, "9" * 5000, str(2**32 - 1), str(2**32), "\x1b[31m1",
]  # fmt: skip


def options() -> Iterator[tuple[str, argparse.Action]]:
    """Every argument of every command."""
    (commands,) = [a.choices for a in _parser()._actions if isinstance(a.choices, dict)]
    for name, parser in commands.items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                yield name, action


def flag(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


OF_NUMBERS = [(command, flag(a), a.type) for command, a in options() if isinstance(a.type, Number)]
#: metavar of paths and of what may be one
PATHS = [(command, a) for command, a in options() if a.metavar in ("FILE", "DIR", "OUT", "MODEL", "NAME")]
PATHS = [(command, a) for command, a in PATHS if flag(a) not in ("--provider", "--runtime", "--pass", "--device")]


def test_every_number_has_a_kind() -> None:
    """Only --prune, which takes fractions, reads its number by itself."""
    of_numbers = {(command, option) for command, option, _ in OF_NUMBERS}
    for command, action in options():
        if action.metavar in ("N", "X", "T") and flag(action) != "--prune":
            assert (command, flag(action)) in of_numbers
    seeds = {kind for _, option, kind in OF_NUMBERS if option == "--seed"}
    assert len(seeds) == 1 and len([o for _, o, _ in OF_NUMBERS if o == "--seed"]) == 5


@pytest.mark.parametrize(("command", "option", "kind"), OF_NUMBERS, ids=[f"{c} {o}" for c, o, _ in OF_NUMBERS])
def test_numbers(command: str, option: str, kind: Number, cli: Cli) -> None:
    """Refused before the model or package is looked at, which is not there; what is taken gets as far as that."""
    for text in NUMBERS:
        line = cli.refuses(command, *REQUIRED.get(command, ["no-package"]), f"{option}={text}")
        try:
            kind(text)
        except argparse.ArgumentTypeError:
            assert line.startswith(f"popcompile {command}: error: argument {option}: "), line
            assert kind.words in line and len(line) < 300 and "\x1b" not in line
        else:
            known = ("--block-size 0", "--block-size 1", "--calibration-texts", "--threads", "--tokens 1", "--limit")
            expected = NO_WORK + tuple(f"{k}" for k in known if k.startswith(option))
            expected += (f"{option} {text}: choose one of",)
            assert any(words in line for words in expected), (text, line)


def test_kinds() -> None:
    """What each takes of the table above."""
    taken = {
        COUNT: {"0", "1", "8"},
        POSITIVE: {"1", "8"},
        PORT: {"0", "1", "8"},
        SEED: {"0", "1", "8", str(2**32 - 1)},
        TEMPERATURE: {"1", "8", "1.5", "99.9", "+1"},
        NATS: {"0", "1", "8", "1.5", "99.9", "+1", str(2**32 - 1), str(2**32)},
        RATIO: {"1", "8", "1.5", "99.9", "+1", str(2**32 - 1), str(2**32)},
    }
    assert {kind for _, _, kind in OF_NUMBERS} == set(taken)
    for kind, expected in taken.items():
        found = set()
        for text in NUMBERS:
            with contextlib.suppress(argparse.ArgumentTypeError):
                assert kind(text) == float(text)
                found.add(text)
        assert found == expected, kind.words


def test_the_api_takes_the_same_numbers() -> None:
    for value in (-1, 2**32, 1.5, True, float("nan")):
        with pytest.raises(PopcompileError, match="is not a seed"):
            SEED.require("--seed", value)
    for value in (float("nan"), float("inf"), -0.1):
        with pytest.raises(PopcompileError, match="is not a number of at least 0"):
            NATS.require("--max-kl", value)
    SEED.require("--seed", 2**32 - 1)
    NATS.require("--max-kl", 0)


# --- paths -----------------------------------------------------------------------------------------------------


def place(command: str, action: argparse.Action, value: str) -> list[str]:
    """The command with `value` for this argument."""
    needed = list(REQUIRED.get(command, ["no-package"]))
    if action.option_strings:
        if flag(action) == "--prompt-file":
            needed = ["no-package"]
        if flag(action) == "--include-path":
            needed += ["--tasks", "x"]
        return [command, *needed, f"{flag(action)}={value}"]
    needed[1 if action.dest == "out" else 0] = value
    return [command, *needed]


@pytest.mark.parametrize(("command", "action"), PATHS, ids=[f"{c} {flag(a)}" for c, a in PATHS])
def test_paths(
    command: str, action: argparse.Action, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no path, in one line that names the argument; what is one that nothing can be done with, in one line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable was read at import
    monkeypatch.setenv("POPCOMPILE_CACHE", str(tmp_path / "a-file" / "cache"))  # demo gets no further
    (tmp_path / "a-file").write_bytes(b"\0\xff")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for value, words in {
        "": "is empty",
        "a\0b": "has a null character",
        "x" * 5000: "File name too long",
        "x/" * 3000: "File name too long",
    }.items():
        line = cli.refuses(*place(command, action, value))
        assert line.startswith(f"popcompile {command}: error: argument {flag_or_metavar(action)}: "), line
        assert words in line and len(line) < 400, line
    for value in (
        ".",
        "..",
        "/",
        "\udcff",
        "a\x1b[31m",
        "../loop",
        "../loop/x",
        "../a-file",
        "../a-file/",
        "../a-file/x",
    ):
        status, out, err = cli.run(*place(command, action, value))
        assert_one_line(status, out if command != "demo" else "", err)
        assert "\x1b" not in err and "\udcff" not in err
    assert list((tmp_path / "here").iterdir()) == []


def flag_or_metavar(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar)
