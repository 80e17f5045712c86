"""What the commands' arguments have in common: one-line complaints, an example in the help, and kinds of numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, example: str) -> Any:
    """Add a command to argparse's `commands`; returns its parser."""
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def positive(text: str) -> int:
    """A number of at least 1, for argparse's `type`."""
    if not text.isdecimal() or len(text) > 9 or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return value


def count(text: str) -> int:
    """A number of at least 0, for argparse's `type`."""
    return 0 if text == "0" else positive(text)


def temperature(text: str) -> float:
    """A number between 0 and 100, for argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 100")
    return value
