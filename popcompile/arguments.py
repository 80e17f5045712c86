"""What the commands' arguments have in common: one-line complaints, an example in the help, and kinds of numbers and
paths, which are checked before anything else.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from popcompile.errors import PopcompileError
from popcompile.terminal import one_printable_line, say


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {one_printable_line(message)} (see {self.prog} --help)")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help. argparse's own ignores a disk that is full."""
        print(message, end="", file=file, flush=True)


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], Any], text: str, example: str) -> Any:
    """Add a command to argparse's `commands`; returns its parser. run: returns the exit status, None for 0."""
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


# --- numbers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A kind of number, for argparse's `type` and for the API's checks. words: what it is, for the complaint.

    whole: of digits alone. Both bounds are allowed. Only ASCII's digits count: what Python also reads as a number
    ("٣", "1_000") is more likely a slip.
    """

    words: str
    least: float
    most: float
    whole: bool = True

    def __call__(self, text: str) -> float:
        pattern = r"\d{1,20}" if self.whole else r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})(e[+-]?\d{1,3})?"
        if re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
            value = int(text) if self.whole else float(text)
            if self.least <= value <= self.most:
                return value
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not {self.words}")

    def require(self, option: str, value: float) -> None:
        """Raises PopcompileError where `value`, that of `option`, is none of this kind."""
        if isinstance(value, bool) or not (isinstance(value, int) or not self.whole):
            raise PopcompileError(f"{option} {value}: is not {self.words}")
        if not self.least <= value <= self.most:
            raise PopcompileError(f"{option} {shortened(str(value))}: is not {self.words}")


_MOST = 999_999_999
POSITIVE = Number("a number of at least 1", 1, _MOST)
COUNT = Number("a number of at least 0", 0, _MOST)
PORT = Number("a port, a number from 0 to 65535", 0, 65535)
#: the seeds that every generator of random numbers takes, NumPy's old one included
SEED = Number("a seed, a number from 0 to 4294967295", 0, 2**32 - 1)
TEMPERATURE = Number("a number between 0 and 100", math.ulp(0.0), math.nextafter(100, 0), whole=False)
NATS = Number("a number of at least 0, for example 0.1", 0, 1e300, whole=False)
RATIO = Number("a number of at least 1, for example 1.05", 1, 1e300, whole=False)


def require_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raises PopcompileError where `value`, that of `option`, is none of the choices."""
    if value not in choices:
        raise PopcompileError(f"{option} {value}: unknown; choose one of {', '.join(choices)}")


def numbers(text: str) -> list[float]:
    """Numbers of at least 1 with commas, for argparse's `type`."""
    try:
        return [POSITIVE(part.strip(" ")) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} is not a list of numbers of at least 1, for example 256,1024"
        ) from None


#: help of the option, of every command that reads a model
TEXT_ONLY = "take the text decoder of a multimodal model; a model of text alone is taken as it is"
#: and of those that run it in PyTorch
DEVICE = "what PyTorch runs the model on: cpu (default), cuda or cuda:N, which was tested on a simulated GPU alone"


# --- paths -----------------------------------------------------------------------------------------------------


def name(text: str) -> str:
    """What may be a path or a hub id, for argparse's `type`; refuses what can be neither."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shortened(text)}: has a null character; give a name without")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise argparse.ArgumentTypeError(f"{shortened(text)}: {error.strerror}; give another") from None
    return text


def path(text: str) -> Path:
    """A folder, or a file to read, for argparse's `type`."""
    return Path(name(text))


def new_file(text: str) -> Path:
    """A file to write, for argparse's `type`."""
    if name(text).endswith(("/", os.sep)) or text.rpartition("/")[2] in (".", ".."):
        raise argparse.ArgumentTypeError(f"{shortened(text)}: is the name of a folder; give a file name")
    return Path(text)


def shortened(text: str, most: int = 100) -> str:
    """Beginning and end of a long text."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
